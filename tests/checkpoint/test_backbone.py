from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dinoengine.checkpoint import CheckpointError, evaluation_config, load_backbone
from dinoengine.checkpoint.convert import save_weights
from dinoengine.checkpoint.layouts import Hints
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from dinoengine.config import get_cfg
from tests.checkpoint.models import SMALL, WITH_REGISTERS, random_weights

IMAGES = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def _saved(weights: Weights, folder: Path, layout: str = "meta") -> str:
    path = str(folder / layout)
    save_weights(weights, path, layout)
    return path


@pytest.mark.parametrize("layout", ["meta", "huggingface", "timm", "dinoengine"])
@pytest.mark.parametrize("spec", [SMALL, WITH_REGISTERS])
def test_any_file_gives_the_tokens_of_its_backbone(layout: str, spec: BackboneSpec, tmp_path: Path) -> None:
    weights = random_weights(spec)
    model = load_backbone(_saved(weights, tmp_path, layout))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    found = model.forward_features(IMAGES)
    backbone = weights.load_backbone()
    with torch.no_grad():
        expected = backbone((IMAGES / 255 - MEAN) / STD)
    for name in ("cls_token", "register_tokens", "patch_tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.cls_token, model(IMAGES).cls_token)


def test_last_blocks_come_oldest_first_and_end_with_the_output(tmp_path: Path) -> None:
    model = load_backbone(_saved(random_weights(), tmp_path))
    outputs = model.forward_last_blocks(IMAGES, 3)
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[-1].cls_token, model(IMAGES).cls_token)
    torch.testing.assert_close(model.forward_last_blocks(IMAGES, 1)[0].patch_tokens, outputs[-1].patch_tokens)
    assert not torch.allclose(outputs[0].cls_token, outputs[1].cls_token)


@pytest.mark.parametrize("number", [0, 4])
def test_blocks_that_are_not_there(number: int, tmp_path: Path) -> None:
    model = load_backbone(_saved(random_weights(), tmp_path))
    with pytest.raises(ValueError, match=rf"The backbone has 3 blocks; got the last {number}\."):
        model.forward_last_blocks(IMAGES, number)


def test_statistics_and_crop_are_those_of_the_config_in_the_file(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.PIXEL_MEAN", (0.1, 0.2, 0.3), "MODEL.PIXEL_STD", (0.5, 0.6, 0.7)])
    cfg.merge_from_list(["INPUT.TEST.RESIZE_PX", 30, "INPUT.TEST.CROP_SIZE_PX", (28,)])
    weights = replace(random_weights(), config=str(cfg.dump()))
    model = load_backbone(_saved(weights, tmp_path, "dinoengine"))
    pixels = (IMAGES / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
        :, None, None
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).cls_token, weights.load_backbone()(pixels).cls_token)
    found = evaluation_config(weights, "w.pth")
    assert (found.INPUT.TEST.RESIZE_PX, found.INPUT.TEST.CROP_SIZE_PX) == (30, (28,))


@pytest.mark.parametrize("grid, crop, resize", [((16, 16), (112, 112), 128), ((37, 37), (224, 224), 256)])
def test_without_a_config_the_crop_is_the_published_one_or_what_the_table_holds(
    grid: tuple[int, int], crop: tuple[int, int], resize: int
) -> None:
    found = evaluation_config(random_weights(replace(SMALL, table_grid=grid)), "w.pth")
    assert (crop, resize) == (found.INPUT.TEST.CROP_SIZE_PX, found.INPUT.TEST.RESIZE_PX)


def test_grey_images_need_no_config_either(tmp_path: Path) -> None:
    weights = random_weights(replace(SMALL, in_chans=1))
    cfg = evaluation_config(weights, "w.pth")
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("L", (0.5,))
    assert load_backbone(_saved(weights, tmp_path)).forward_features(IMAGES[:, :1]).cls_token.shape == (2, 64)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7), "fc.bias": torch.zeros(4)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet.pth is of no layout known here; it has .*conv1"):
        load_backbone(str(tmp_path / "resnet.pth"))


def test_missing_entries_are_named_unless_they_are_allowed(tmp_path: Path) -> None:
    weights = random_weights()
    path = _saved(weights, tmp_path)
    state = torch.load(path, weights_only=True)
    del state["blocks.1.mlp.fc1.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing: blocks.1.mlp.fc1.bias"):
        load_backbone(path)
    load_backbone(path, allow=["blocks.1.mlp.fc1.bias"])


def _without_a_readable_config(folder: Path) -> str:
    path = _saved(random_weights(), folder, "dinoengine")
    data = torch.load(path, weights_only=True)
    torch.save({**data, "config": "NO_SUCH_KEY: 1\n"}, path)
    return path


def test_an_unreadable_config_makes_the_assumed_statistics_a_loud_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _without_a_readable_config(tmp_path)
    load_backbone(path, hints=Hints(num_heads=1))
    (warning,) = [r.getMessage() for r in caplog.records if "PIXEL STATISTICS UNKNOWN" in r.getMessage()]
    for part in (path, "mean (0.485, 0.456, 0.406)", "std (0.229, 0.224, 0.225)", "--pixel-mean", "pixel_mean="):
        assert part in warning


@pytest.mark.parametrize("layout", ["meta", "dinoengine"])
def test_published_weights_are_no_reason_to_warn(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their statistics are ImageNet's, also after a conversion; an info says so."""
    path = _saved(random_weights(), tmp_path, layout)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        load_backbone(path)
    (record,) = [r for r in caplog.records if "ASSUMED" in r.getMessage()]
    assert record.levelno == logging.INFO


def test_given_statistics_are_used_and_leave_nothing_to_assume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _without_a_readable_config(tmp_path)
    model = load_backbone(path, hints=Hints(num_heads=1), pixel_mean=(0.1, 0.2, 0.3), pixel_std=(1.0, 2.0, 4.0))
    expected = (IMAGES / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1.0, 2.0, 4.0])[
        :, None, None
    ]
    torch.testing.assert_close(model.pixel_norm(IMAGES), expected)
    assert "ASSUMED" not in caplog.text


@pytest.mark.parametrize(
    "given, message",
    [
        ({"pixel_mean": (0.5,)}, r"pixel_mean takes finite numbers, one for each of the 3 channel\(s\).*got \(0\.5,\)"),
        ({"pixel_std": (0.5, 0.0, 0.5)}, r"pixel_std takes finite numbers above 0"),
        ({"pixel_mean": (0.5, float("nan"), 0.5)}, r"pixel_mean takes finite numbers"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    given: dict[str, tuple[float, ...]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(_saved(random_weights(), tmp_path), **given)  # type: ignore[arg-type]
