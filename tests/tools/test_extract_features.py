from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import load_backbone
from dinoengine.checkpoint.convert import save_weights
from dinoengine.config import get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import FeatureStore, extract_features
from tests.checkpoint.models import random_weights
from tests.tools.tools import load_tool

TOOL = load_tool("extract_features")
DATA = "synthetic:num_images=7:num_classes=2:size=28"


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = str(tmp_path / "w.pth")
    save_weights(random_weights(), path, "meta")
    return path


def _run(weights: str, out: Path, *more: str) -> int:
    code: int = TOOL.main(["--device", "cpu", "--weights", weights, DATA, str(out), *more])
    return code


def test_the_command_writes_what_the_model_gives(weights: str, tmp_path: Path) -> None:
    options = ["--tokens", "cls,patch", "--num-last-blocks", "2", "--batch-size", "3", "--resize", "0", "--crop", "14"]
    assert _run(weights, tmp_path / "out", *options) == 0
    store = FeatureStore(str(tmp_path / "out"))
    assert {name: array.shape for name, array in store.features.items()} == {"cls": (7, 128), "patch": (7, 4, 128)}
    assert store.meta["preprocessing"]["crop_size_px"] == [14, 14]
    assert store.meta["weights_file"] == weights
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.TEST.RESIZE_PX", 0, "INPUT.TEST.CROP_SIZE_PX", 14, "DATALOADER.NUM_WORKERS", 0])
    expected = extract_features(load_backbone(weights), build_test_loader(cfg, DATA)).features
    torch.testing.assert_close(torch.tensor(store.features["cls"][:, 64:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tokens", "cls,pooled"], "Tokens are some of cls, mean_patch"),
        (["--crop", "15"], "no multiple of the patch of 7"),
        (["--num-last-blocks", "9"], "The backbone has 3 blocks"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    more: list[str], message: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        _run(weights, tmp_path / "out", *more)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--resize", "-5"], ["--crop", "0"], ["--num-workers", "-1"]])
def test_numbers_that_cannot_be_are_refused_at_parsing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TOOL.parse_args(["--weights", "w.pth", DATA, "out", *words])
    assert f"{words[0]} must be {0 if words[0] != '--crop' else 1} or more; got {words[1]}" in capsys.readouterr().err


def test_given_pixel_statistics_are_used_and_recorded(weights: str, tmp_path: Path) -> None:
    assert _run(weights, tmp_path / "out", "--pixel-mean", "0.1,0.2,0.3", "--pixel-std", "0.5,0.5,0.5") == 0
    found = FeatureStore(str(tmp_path / "out")).meta["preprocessing"]
    assert (found["pixel_mean"], found["pixel_std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TOOL.main(["--help"])
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert "torchrun" in out
