"""From the command line to a checked config."""

from __future__ import annotations

import argparse
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dinoengine.config import CfgNode, ConfigError, get_cfg
from dinoengine.data import DataError
from dinoengine.engine import default_argument_parser, default_setup, exit_on_user_error, load_config, save_config
from dinoengine.engine.setup import check_output_dir, load_weights_for_evaluation, resolve_device
from tests.checkpoint.models import SMALL, random_weights


def _args(*words: str) -> argparse.Namespace:
    return default_argument_parser().parse_args(list(words))


@pytest.mark.parametrize(
    "words",
    [
        ["--num-gpus", "2", "--resume", "A.B", "1", "C=2"],
        ["A.B", "1", "C=2", "--num-gpus", "2", "--resume"],
        ["A.B", "1", "--num-gpus", "2", "C=2", "--resume"],
    ],
)
def test_flags_stand_before_after_or_among_overrides(words: list[str]) -> None:
    args = _args(*words)
    assert (args.num_gpus, args.resume, args.opts) == (2, True, ["A.B", "1", "C=2"])


def test_flags_of_common_forks_are_keys() -> None:
    words = ["--num-gpus", "0", "DATASETS.TRAIN=digits"]
    flags = ["--save-frequency", "50", "--max-to-keep", "3"]
    solver = load_config(_args(*words, *flags)).SOLVER
    assert (solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_MAX_TO_KEEP) == (50, 3)
    assert load_config(_args(*words, *flags, "SOLVER.CHECKPOINT_PERIOD", "50")).SOLVER.CHECKPOINT_PERIOD == 50
    with pytest.raises(ConfigError, match=r"--save-frequency: 50 and the override SOLVER.CHECKPOINT_PERIOD 60 are one"):
        load_config(_args(*words, *flags, "SOLVER.CHECKPOINT_PERIOD=60"))
    with pytest.raises(ConfigError, match=r"SOLVER.CHECKPOINT_MAX_TO_KEEP must be"):
        load_config(_args(*words, "--max-to-keep", "-1"))


def test_negative_values_are_values(tmp_path: Path) -> None:
    assert _args("SEED", "-1", "--resume").opts == ["SEED", "-1"]


@pytest.mark.parametrize("flag", ["--resum", "--gpus"])
def test_a_flag_that_does_not_exist_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _args(flag)
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "num_gpus", "visible", "expected"),
    [
        ("auto", None, 0, ("cpu", 1)),
        ("auto", None, 4, ("cuda", 1)),
        ("auto", 0, 4, ("cpu", 1)),
        ("auto", 3, 4, ("cuda", 3)),
        ("cpu", None, 4, ("cpu", 1)),
        ("cpu", 0, 0, ("cpu", 1)),
        ("cpu", 2, 0, ("cpu", 2)),
        ("cuda", None, 1, ("cuda", 1)),
        ("cuda", 2, 2, ("cuda", 2)),
    ],
)
def test_device_and_processes(
    monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int | None, visible: int, expected: tuple[str, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert resolve_device(device, num_gpus) == expected


@pytest.mark.parametrize(
    ("device", "num_gpus", "visible", "message"),
    [
        ("auto", 3, 2, r"3 asked for, but 2 GPU\(s\) are visible.*MODEL.DEVICE cpu for 3 process"),
        ("auto", 1, 0, "1 asked for, but 0 GPU"),
        ("cuda", None, 0, "1 asked for, but 0 GPU"),
        ("cuda", 0, 2, "0 means the CPU, but MODEL.DEVICE is cuda"),
        ("cpu", -1, 0, "must be 0 or more"),
    ],
)
def test_impossible_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int | None, visible: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with pytest.raises(ConfigError, match=message):
        resolve_device(device, num_gpus)


def test_load_config_merges_resolves_checks_and_freezes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("SOLVER: {BASE_LR: 1}\nDATASETS: {TRAIN: digits}\n")
    args = _args("--config-file", str(path), "--num-gpus", "0", "SEED=5")
    cfg = load_config(args)
    assert (cfg.SOLVER.BASE_LR, cfg.DATASETS.TRAIN, cfg.SEED, cfg.MODEL.DEVICE) == (1.0, ("digits",), 5, "cpu")
    assert args.num_gpus == 1
    assert cfg.is_frozen()


def test_the_batch_is_checked_against_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "digits", "SOLVER.IMS_PER_BATCH", "10"]
    with pytest.raises(ConfigError, match="not divisible by 8 process"):
        load_config(_args(*words, "--num-gpus", "4", "--num-machines", "2", "--dist-url", "tcp://a:1"))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="not divisible by 3 process"):
        load_config(_args(*words))


def test_several_machines_need_an_address() -> None:
    with pytest.raises(ConfigError, match="--dist-url: several machines need it"):
        load_config(_args("--num-gpus", "0", "--num-machines", "2", "DATASETS.TRAIN=digits"))


def test_eval_only_needs_no_training_data() -> None:
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty"):
        load_config(_args("--num-gpus", "0"))
    load_config(_args("--num-gpus", "0", "--eval-only", "DATASETS.TEST=digits"))


@pytest.mark.parametrize("words", [("--num-machines", "0"), ("--machine-rank", "1"), ("--machine-rank", "-1")])
def test_impossible_machines_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--num-machines: must be 1 or more, and --machine-rank from 0 below it"):
        load_config(_args("--num-gpus", "0", "DATASETS.TRAIN=digits", *words))


def test_setup_writes_a_config_that_alone_reproduces_the_run(tiny_cfg: CfgNode) -> None:
    default_setup(tiny_cfg, _args())
    again = get_cfg()
    again.merge_from_file(os.path.join(tiny_cfg.OUTPUT_DIR, "config.yaml"))
    tiny_cfg.MODEL.DEVICE = "auto"  # which means the CPU here
    assert again == tiny_cfg
    text = Path(tiny_cfg.OUTPUT_DIR, "log.txt").read_text()
    assert "Python" in text
    assert "MAX_ITER: 10" in text


def test_a_device_that_auto_would_not_choose_is_kept(tiny_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, written in (("cpu", "cpu"), ("cuda", "auto")):
        tiny_cfg.MODEL.DEVICE = device
        os.makedirs(tiny_cfg.OUTPUT_DIR, exist_ok=True)
        save_config(tiny_cfg)
        assert yaml.safe_load(Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_text())["MODEL"]["DEVICE"] == written


def test_resuming_does_not_touch_the_config_before_the_checkpoint_fits(tiny_cfg: CfgNode) -> None:
    default_setup(tiny_cfg, _args())
    before = Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_bytes()
    tiny_cfg.MODEL.DINO_HEAD.NUM_PROTOTYPES = 99
    default_setup(tiny_cfg, _args("--resume"))
    assert Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_bytes() == before


def test_a_drawn_seed_is_kept_for_the_resumed_run(tiny_cfg: CfgNode) -> None:
    tiny_cfg.SEED = -1
    tiny_cfg.freeze()
    first = default_setup(tiny_cfg, _args())
    assert first.SEED >= 0
    assert first.is_frozen()
    saved = yaml.safe_load(Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_text())
    assert saved["SEED"] == first.SEED
    assert default_setup(tiny_cfg, _args("--resume")).SEED == first.SEED


def test_eval_only_does_not_overwrite_the_config_of_a_run(tiny_cfg: CfgNode) -> None:
    default_setup(tiny_cfg, _args())
    tiny_cfg.SOLVER.MAX_ITER = 77
    default_setup(tiny_cfg, _args("--eval-only"))
    assert yaml.safe_load(Path(tiny_cfg.OUTPUT_DIR, "config.yaml").read_text())["SOLVER"]["MAX_ITER"] == 10


@pytest.mark.parametrize("trace", ["last_checkpoint", "model_final.pth", "metrics.json"])
def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, trace: str) -> None:
    (tmp_path / trace).write_text("x")
    with pytest.raises(ConfigError, match=f"already holds a run \\({trace}\\).*--resume"):
        check_output_dir(str(tmp_path), new_run=True)
    check_output_dir(str(tmp_path), new_run=False)


def test_leftovers_of_a_start_that_failed_are_no_run(tmp_path: Path) -> None:
    for name in ("log.txt", "config.yaml"):
        (tmp_path / name).write_text("x")
    (tmp_path / "metrics.json").touch()
    check_output_dir(str(tmp_path), new_run=True)


def test_an_output_dir_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); choose another"):
        check_output_dir(str(tmp_path / "file" / "run"), new_run=True)
    with pytest.raises(ConfigError, match="file is a file; name a folder"):
        check_output_dir(str(tmp_path / "file"), new_run=True)
    with pytest.raises(ConfigError, match="is empty; name a folder"):
        check_output_dir("", new_run=True)


@pytest.mark.parametrize("error", [ValueError("a"), KeyError("a"), FileNotFoundError("a"), ConfigError("x", ["a"])])
def test_a_user_error_is_one_line_and_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done, exit_on_user_error():
        raise error
    assert done.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_another_rank_tells_its_name_after_rank_0_had_its_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit), exit_on_user_error():
        raise ValueError("no images")
    assert re.fullmatch(r"error on rank 1 \(.+\): no images\n", capsys.readouterr().err)
    assert waited == [3]


def test_only_the_named_errors_are_the_users() -> None:
    with pytest.raises(ValueError, match="a bug"), exit_on_user_error(DataError):
        raise ValueError("a bug")
    with pytest.raises(SystemExit), exit_on_user_error(DataError):
        raise DataError("a file")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError, match="bug"), exit_on_user_error():
        raise AssertionError("bug")


def test_nothing_to_evaluate_is_an_error(tiny_cfg: CfgNode) -> None:
    for resume in (False, True):
        with pytest.raises(ConfigError, match="MODEL.WEIGHTS: is empty, so there is nothing to evaluate"):
            load_weights_for_evaluation(tiny_cfg, torch.nn.Linear(1, 1), resume=resume)


def test_weights_of_another_model_are_not_read_with_the_heads_of_the_config(tmp_path: Path) -> None:
    """A ViT-S file and a base config: the answer is ViT-S, not a ViT-S with twelve heads."""
    spec = replace(SMALL, embed_dim=384, depth=12, num_heads=6, ffn_hidden=1536)
    torch.save(random_weights(spec).backbone, tmp_path / "s.pth")
    words = ("--num-gpus", "0", "DATASETS.TRAIN=digits", f"MODEL.WEIGHTS={tmp_path}/s.pth")
    crops = ("INPUT.GLOBAL_CROPS.SIZE_PX=28", "INPUT.LOCAL_CROPS.SIZE_PX=14")
    with pytest.raises(ConfigError, match=r"holds ViT-S/7(?s:.)*MODEL\.VIT\.SIZE is base, set it to small") as caught:
        load_config(_args(*words, *crops, "MODEL.VIT.PATCH_SIZE_PX=7", "MODEL.VIT.SIZE=base"))
    assert "NUM_HEADS" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"MODEL\.VIT\.PATCH_SIZE_PX is 16, set it to 7"):
        load_config(_args(*words, "MODEL.VIT.SIZE=small"))
    torch.save(random_weights().backbone, tmp_path / "s.pth")  # 64 channels, which six heads do not divide
    with pytest.raises(ConfigError, match=r"MODEL\.VIT\.EMBED_DIM is 0, set it to 64"):
        load_config(_args(*words, *crops, "MODEL.VIT.PATCH_SIZE_PX=7", "MODEL.VIT.SIZE=small"))
