"""A bad step of a real run, run again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dinoengine.config import CfgNode
from dinoengine.engine import HookBase, SSLTrainer, hooks, launch, save_config
from dinoengine.engine.replay import (
    missing_record,
    read_records,
    recorded_steps,
    render,
    replay,
    replay_config,
    state_before,
    verdict,
)
from dinoengine.modeling import VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.structures import PickedTokens
from dinoengine.utils import comm
from tests.tools.tools import load_tool

tool = load_tool("replay_step")


class _Break(HookBase):
    """Makes a weight so large before an iteration that the step overflows; it stays in the weights that are saved."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            block = self.trainer.bare_model.student["backbone"].blocks[0]  # type: ignore[attr-defined]
            with torch.no_grad():
                block.mlp.fc1.weight[0].fill_(torch.inf)


def _run(cfg: CfgNode, iteration: int | None, **overrides: Any) -> Path:
    cfg.merge_from_list([w for key, value in overrides.items() for w in (key.replace("__", "."), str(value))])
    out = Path(cfg.OUTPUT_DIR)
    out.mkdir()
    save_config(cfg)
    trainer = SSLTrainer(cfg)
    if iteration is None:
        trainer.train()
        return out
    trainer.register_hooks([_Break(iteration)])
    with pytest.raises(FloatingPointError):
        trainer.train()
    return out


def _content(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.fixture
def quick(tiny_cfg: CfgNode) -> CfgNode:
    tiny_cfg.merge_from_list(["DATASETS.TEST", "()", "COLLAPSE_GUARD.ACTION", "off", "MODEL.VIT.DROP_PATH_RATE", "0.3"])
    return tiny_cfg


def test_the_step_that_stopped_a_run_is_reproduced(quick: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(quick, 3)
    before = _content(out)
    assert tool.main(["--run", str(out)]) == 0
    assert _content(out) == before
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("verdict: reproduced")
    assert "first module with an output that is not finite: student.backbone.blocks.0.mlp.fc1" in printed
    assert "in the rows of all images of the batch" in printed
    assert "rank 0: positions 12 to 15" in printed


def test_the_losses_of_a_finite_step_are_those_of_the_run(quick: CfgNode, tmp_path: Path) -> None:
    """From a checkpoint three steps before, and from the beginning: the very numbers of metrics.json."""
    out = _run(quick, None, SOLVER__CHECKPOINT_PERIOD=4, SOLVER__MAX_ITER=8)
    rows = {r["iteration"]: r for r in map(json.loads, (out / "metrics.json").read_text().splitlines())}
    for iteration, start in ((6, "model_0000003.pth"), (2, "")):
        assert os.path.basename(state_before(str(out), iteration)) == start
        cfg, num_processes = replay_config(str(out), [], None, str(tmp_path / f"scratch{iteration}"))
        replays = replay(cfg, str(out), iteration)
        assert num_processes == len(replays) == 1
        assert replays[0].is_finite
        assert replays[0].first_module == replays[0].first_gradient == ""
        for name, value in replays[0].step["losses"].items():
            assert value == rows[iteration][name], name
        assert "finite here, and no record says otherwise: loss" in render(replays, [], 0.0)


def test_a_bad_step_that_is_finite_here_says_so(
    quick: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _run(quick, 3)
    path = out / "bad_steps" / "model_before_0000003.pth"
    state = torch.load(path, weights_only=True)
    weight = state["model"]["student.backbone.blocks.0.mlp.fc1.weight"]
    weight[0] = weight[1]
    state.pop("digest", None)
    torch.save(state, path)
    assert tool.main(["--run", str(out), "--iteration", "3"]) == 1
    assert "verdict: finite here: loss " in capsys.readouterr().out


def test_one_image_that_is_not_finite_is_named(quick: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _run(quick, None, SOLVER__MAX_ITER=2)
    original = PixelNorm.forward

    def poisoned(self: PixelNorm, images: torch.Tensor) -> torch.Tensor:
        normed = original(self, images)
        if len(normed) == 8:  # the global crops of four images: the second view of image 2
            normed[6] = torch.nan
        return normed

    monkeypatch.setattr(PixelNorm, "forward", poisoned)
    cfg, _ = replay_config(str(out), [], None, str(tmp_path / "scratch"))
    found = replay(cfg, str(out), 0)
    assert (found[0].first_module, found[0].images) == ("pixel_norm", [2])
    assert found[0].first_gradient != ""
    assert verdict(found, []).startswith("not finite here (loss nan); there is no record")
    assert f"position 2: {found[0].step['images'][2]}" in render(found, [], 0.0)


@pytest.mark.parametrize(("side", "module"), [("teacher", "teacher.backbone"), ("student", "student.backbone")])
def test_an_image_of_a_later_micro_batch_is_named(
    quick: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, module: str
) -> None:
    """The teacher goes through all micro-batches before the first of them reaches the model."""
    out = _run(quick, None, SOLVER__MAX_ITER=2, SOLVER__NUM_MICRO_BATCHES=2, MODEL__LOSS__KOLEO_GROUP_SIZE=2)
    cfg, _ = replay_config(str(out), [], None, str(tmp_path / "scratch"))
    original, calls = VisionTransformer.pick_tokens, {"teacher": 0, "student": 0}

    def poisoned(self: VisionTransformer, *args: Any) -> list[PickedTokens]:
        picked = original(self, *args)
        mine = "student" if self.training else "teacher"
        calls[mine] += 1
        if (mine, calls[mine]) == (side, 2):
            with torch.no_grad():
                picked[0].cls_token[3] = torch.nan  # two views of two images: the second view of its image 1
        return picked

    monkeypatch.setattr(VisionTransformer, "pick_tokens", poisoned)
    found = replay(cfg, str(out), 0)
    assert (found[0].first_module, found[0].images) == (module, [3])
    assert f"image 3 of the batch, position 3: {found[0].step['images'][3]}" in render(found, [], 0.0)


def test_all_images_of_a_micro_batch_are_one_line(quick: CfgNode, capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(quick, 1, SOLVER__NUM_MICRO_BATCHES=2, MODEL__LOSS__KOLEO_GROUP_SIZE=2)
    assert tool.main(["--run", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "in the rows of all images of micro-batch 0" in printed
    assert printed.rstrip().endswith("verdict: reproduced")


def test_recorded_steps_are_found_and_wrong_input_is_refused(
    tmp_path: Path, tiny_cfg: CfgNode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recorded_steps(str(tmp_path)) == []
    (tmp_path / "bad_steps").mkdir()
    for name in ("0000012_rank0.json", "0000012_rank1.json", "0000007_rank0.json"):
        (tmp_path / "bad_steps" / name).write_text("{}")
    assert recorded_steps(str(tmp_path)) == [7, 12]
    assert len(read_records(str(tmp_path), 12)) == 2
    assert missing_record(str(tmp_path), 12) == ""
    assert missing_record(str(tmp_path), 3) == "There is no record of iteration 3 to compare with; of 7, 12 there are."
    assert missing_record(str(tmp_path / "none"), 3).endswith("bad_steps has none.")
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, message in (
        (["--run", str(empty)], "has no bad_steps; name a step with --iteration"),
        (["--run", str(tmp_path)], "config.yaml is not there; --run takes the OUTPUT_DIR"),
    ):
        with pytest.raises(SystemExit) as done:
            tool.main(words)
        assert done.value.code == 2
        assert message in capsys.readouterr().err


def _break_rank_1(cfg: CfgNode, scratch: str) -> None:
    """Train on two ranks until an image of rank 1 is no number; run that step again; rank 0 notes what it says."""
    original = PixelNorm.forward
    is_bad = [False]

    def poisoned(self: PixelNorm, images: torch.Tensor) -> torch.Tensor:
        normed = original(self, images)
        if comm.get_rank() == 1 and is_bad[0]:
            normed[-1] = torch.nan
        return normed

    PixelNorm.forward = poisoned  # type: ignore[method-assign]
    trainer = SSLTrainer(cfg)
    trainer.register_hooks([hooks.CallbackHook(before_step=lambda t: is_bad.__setitem__(0, t.iter == 1))])
    with pytest.raises(FloatingPointError):
        trainer.train()
    comm.synchronize()
    out = cfg.OUTPUT_DIR
    replays = replay(replay_config(out, ["MODEL.DEVICE", "cpu"], 2, scratch)[0], out, 1)
    if comm.is_main_process():
        Path(out, "verdict").write_text(render(replays, read_records(out, 1), 0.0))


@pytest.mark.slow
def test_the_rank_that_began_it_is_known(quick: CfgNode, tmp_path: Path) -> None:
    quick.merge_from_list(["MODEL.LOSS.KOLEO_WEIGHT", "0.0"])
    Path(quick.OUTPUT_DIR).mkdir()
    save_config(quick)
    launch(_break_rank_1, 2, args=(quick, str(tmp_path / "scratch")), device="cpu")
    records = read_records(quick.OUTPUT_DIR, 1)
    assert [r["positions"] for r in records] == [[4, 5], [6, 7]]
    assert [r["loss_is_finite"] for r in records] == [True, False]
    assert records[0]["non_finite_gradients"] == records[1]["non_finite_gradients"] != []  # averaged: they do not tell
    assert sorted(p.name for p in Path(quick.OUTPUT_DIR, "bad_steps").glob("*.pth")) == ["model_before_0000001.pth"]
    text = Path(quick.OUTPUT_DIR, "verdict").read_text()
    assert "verdict: reproduced" in text
    assert "first module with an output that is not finite: none" in text.split("rank 1:")[0]
    assert f"image 1 of the batch, position 7: {records[1]['images'][1]}" in text.split("rank 1:")[1]
