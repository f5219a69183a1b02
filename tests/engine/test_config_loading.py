"""From flags to a checked config."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.config import ConfigError
from dinoengine.engine.arguments import default_argument_parser
from dinoengine.engine.config_loading import load_config, resolve_device
from tests.checkpoint.models import SMALL, random_weights


def _args(*words: str) -> argparse.Namespace:
    return default_argument_parser().parse_args(list(words))


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
