"""Bad images of real files, through loader, trainer and hook, with interruptions and in two processes."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import DataError, build_train_loader
from dinoengine.engine import SSLTrainer, hooks, launch, run_command
from dinoengine.structures import BadImage
from dinoengine.utils import comm
from tests.conftest import TINY
from tests.engine.toys import ToyData, toy_trainer


def _images(root: Path, num_images: int = 24, num_bad: int = 2) -> str:
    """A folder whose first images are cut short."""
    root.mkdir()
    for i in range(num_images):
        Image.fromarray(np.full((12, 12, 3), 10 * i, dtype=np.uint8)).save(root / f"{i:02d}.png")
        if i < num_bad:
            os.truncate(root / f"{i:02d}.png", 50)
    return f"folder:{root}"


def _cfg(output_dir: Path, train: str, **overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([word for key, value in TINY.items() for word in (key, str(value))])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), ()
    cfg.OUTPUT_DIR, cfg.DATALOADER.MAX_BAD_IMAGE_SHARE = str(output_dir), 0.5
    cfg.LOG.PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = 4, 3, 14
    cfg.merge_from_list([word for key, value in overrides.items() for word in (key, str(value))])
    return cfg


class _KilledError(RuntimeError):
    pass


def _run(cfg: CfgNode, *, end_at: int | None = None, resume: bool = False) -> SSLTrainer:
    def end(trainer: Any) -> None:
        if trainer.iter == end_at:
            raise _KilledError

    trainer = SSLTrainer(cfg)
    trainer.register_hooks([hooks.CallbackHook(before_step=end)])
    trainer.resume_or_load(resume=resume)
    if end_at is None:
        trainer.train()
    else:
        with pytest.raises(_KilledError):
            trainer.train()
    return trainer


def _log(trainer: SSLTrainer) -> hooks.BadImageLog:
    return next(hook for hook in trainer._hooks if isinstance(hook, hooks.BadImageLog))


def _expected_lines(cfg: CfgNode) -> list[list[str]]:
    """What the stream says, read without a trainer."""
    batches = islice(build_train_loader(cfg, replace_bad_images=True), cfg.SOLVER.MAX_ITER)
    return [
        [str(iteration), str(bad.position), bad.path, bad.cause]
        for iteration, batch in enumerate(batches)
        for bad in batch.bad_images
    ]


def _lines(output_dir: Path) -> list[list[str]]:
    return [line.split("\t") for line in (output_dir / "bad_images.txt").read_text(encoding="utf-8").splitlines()]


def test_every_bad_image_is_listed_counted_and_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = _cfg(tmp_path / "run", _images(tmp_path / "images", num_bad=8))
    log = _log(_run(cfg))
    expected = _expected_lines(cfg)
    assert _lines(tmp_path / "run") == expected
    assert {Path(line[2]).name for line in expected} == {f"{i:02d}.png" for i in range(8)}
    assert (log.num_images, log.num_bad) == (14 * 4, len(expected))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    counts = {row["iteration"]: row["bad_images"] for row in rows if "bad_images" in row}
    flushed = (3, 7, 11)  # LOG.PERIOD 4
    assert counts == {t: sum(int(line[0]) <= t for line in expected) for t in flushed}
    warned = [line for line in capsys.readouterr().out.splitlines() if "Another image took its place" in line]
    assert len(expected) > 10
    assert len(warned) == 10
    assert expected[0][2] in warned[0]
    assert expected[0][3] in warned[0]
    assert "Further ones are only listed in" in warned[-1]


@pytest.mark.parametrize("end_at", [1, 3, 7, 10, 13])
def test_an_interrupted_run_leaves_the_file_of_one_that_was_not(
    straight: tuple[CfgNode, SSLTrainer], tmp_path: Path, end_at: int
) -> None:
    """Between two checkpoints, so that iterations with bad images are repeated; the file may even be cut."""
    cfg = straight[0].clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    _run(cfg, end_at=end_at)
    if end_at == 10:
        with open(tmp_path / "run" / "bad_images.txt", "ab") as file:
            file.write(b"\xff\n1")  # no text, no iteration, no end
    resumed = _run(cfg, resume=True)
    assert resumed.start_iter == end_at // 3 * 3
    assert _lines(tmp_path / "run") == _expected_lines(cfg)
    assert _log(resumed).state_dict() == _log(straight[1]).state_dict()
    for name, value in straight[1].bare_model.state_dict().items():
        assert torch.equal(value, resumed.bare_model.state_dict()[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[CfgNode, SSLTrainer]:
    folder = tmp_path_factory.mktemp("straight")
    cfg = _cfg(folder / "run", _images(folder / "images", num_bad=6))
    return cfg, _run(cfg)


def test_a_good_set_leaves_no_file(tmp_path: Path) -> None:
    trainer = _run(_cfg(tmp_path / "run", _images(tmp_path / "images", num_bad=0), **{"SOLVER.MAX_ITER": 4}))
    assert not (tmp_path / "run" / "bad_images.txt").exists()
    assert trainer.storage.latest()["bad_images"] == (0, 3)


def _command(folder: Path, *more: object) -> list[str]:
    settings = {
        **TINY,
        "DATASETS.TEST": "()",
        "OUTPUT_DIR": folder / "run",
        "DATASETS.TRAIN": f"folder:{folder}/images",
    }
    return ["--num-gpus", "0", *(str(word) for item in settings.items() for word in item), *map(str, more)]


def test_too_many_end_the_run_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A third is bad and a hundredth allowed; ten are needed for that, and LOG.PERIOD is 2: after iteration 5, 7 or so."""
    _images(tmp_path / "images", num_bad=8)
    with pytest.raises(SystemExit) as ended:
        run_command(SSLTrainer, _command(tmp_path, "SOLVER.MAX_ITER", 100))
    assert ended.value.code == 2
    lines = _lines(tmp_path / "run")
    iteration = int(lines[-1][0]) // 2 * 2 + 1
    num_before = sum(int(line[0]) <= iteration - 2 for line in lines)
    assert num_before < 10 <= len(lines), "at the first flush with ten of them"
    error = capsys.readouterr().err
    tried = 4 * (iteration + 1) + len(lines)
    assert f"error: {len(lines)} of {tried} images so far could not be used" in error
    assert "MAX_BAD_IMAGE_SHARE is 0.01. All are listed in" in error
    assert "images/0" in error
    assert "Traceback" not in error


def test_few_bad_images_end_no_run(tmp_path: Path) -> None:
    """One of 24 is more than the share, but nine of them say too little; the tenth ends it."""
    _images(tmp_path / "images", num_bad=1)
    run_command(SSLTrainer, _command(tmp_path, "SOLVER.MAX_ITER", 20))
    assert len(_lines(tmp_path / "run")) < 10


@pytest.mark.parametrize("share", [0, 0.01, 1])
def test_a_set_without_a_good_image_ends_at_once(
    tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    _images(tmp_path / "images", num_images=3, num_bad=3)
    with pytest.raises(SystemExit) as ended:
        run_command(SSLTrainer, _command(tmp_path, "DATALOADER.MAX_BAD_IMAGE_SHARE", share))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "images/0" in error
    assert ("no image that can be used" in error) == (share > 0)


def test_share_0_means_the_first_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _images(tmp_path / "images", num_bad=1)
    with pytest.raises(SystemExit) as ended:
        run_command(SSLTrainer, _command(tmp_path, "DATALOADER.MAX_BAD_IMAGE_SHARE", 0, "SOLVER.MAX_ITER", 20))
    assert ended.value.code == 2
    assert "images/00.png is not a readable image" in capsys.readouterr().err


def test_names_and_causes_stay_on_their_line_and_in_their_field(tmp_path: Path) -> None:
    odd = os.fsdecode(b"/a\tb/new\nline\\caf\xe9.png")
    trainer = toy_trainer(ToyData())
    trainer.register_hooks([hooks.BadImageLog(str(tmp_path), 8, 1.0)])
    trainer.bad_images = [(0, BadImage(5, odd, "two\r\nlines")), (0, BadImage(3, "/ü.png", "x"))]
    trainer.train(0, 1)
    text = (tmp_path / "bad_images.txt").read_bytes().decode("utf-8")
    assert text == "0\t3\t/ü.png\tx\n0\t5\t/a\\tb/new\\nline\\\\caf\\udce9.png\ttwo\\r\\nlines\n"


def test_what_an_error_leaves_behind_is_still_listed(tmp_path: Path) -> None:
    cfg = _cfg(tmp_path / "run", _images(tmp_path / "images", num_bad=8))
    _run(cfg, end_at=2)
    assert _lines(tmp_path / "run") == [line for line in _expected_lines(cfg) if int(line[0]) < 2]


def test_a_checkpoint_without_the_count_is_refused() -> None:
    trainer = toy_trainer(ToyData())
    state = trainer.state_dict()
    trainer.register_hooks([hooks.BadImageLog("", 8, 1.0)])
    with pytest.raises(ValueError, match="no state for hook 'BadImageLog'"):
        trainer.load_state_dict(state)


# ---- two processes


def _work(folder: str, train: str) -> None:
    torch.set_num_threads(1)
    trainer = _run(_cfg(Path(folder, "two"), train))
    report = _log(trainer).state_dict()
    try:
        _run(_cfg(Path(folder, "too many"), train, **{"DATALOADER.MAX_BAD_IMAGE_SHARE": 0.02}))
        report["ended"] = "not"
    except DataError as error:
        report["ended"] = str(error)
    Path(folder, f"rank{comm.get_rank()}.json").write_text(json.dumps(report))


@pytest.mark.slow
def test_two_processes_count_and_end_together(tmp_path: Path) -> None:
    train = _images(tmp_path / "images", num_bad=8)
    assert launch(_work, 2, args=(str(tmp_path), train), device="cpu") is None
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first == second
    one = _run(_cfg(tmp_path / "one", train))
    assert _lines(tmp_path / "two") == _lines(tmp_path / "one")
    assert {key: first[key] for key in ("num_images", "num_bad")} == _log(one).state_dict()
    assert "could not be used" in first["ended"]
