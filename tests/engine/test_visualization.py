"""What the sheets show is what the run gets; how they look has to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinoengine.config import CfgNode
from dinoengine.data import DataError, build_train_loader
from dinoengine.engine import visualization
from dinoengine.engine.visualization import make_sheets
from tests.conftest import TINY_CLASSIFIER


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Title -> what the sheet was made of, filled by ``make_sheets``."""
    made: dict[str, dict[str, Any]] = {}
    real = visualization.contact_sheet

    def record(title: str, notes: Any, rows: Any, columns: Any = (), edge: int = 168) -> Any:
        made[title.split(":")[0]] = {"notes": " ".join(notes), "rows": rows, "columns": list(columns)}
        return real(title, notes, rows, columns, edge)

    monkeypatch.setattr(visualization, "contact_sheet", record)
    return made


@pytest.mark.parametrize("backend", ["reference", "device"])
def test_crops_and_masks_are_those_of_the_first_batch(
    backend: str, tiny_cfg: CfgNode, sheets: dict[str, dict[str, Any]]
) -> None:
    tiny_cfg.INPUT.AUGMENTATION_BACKEND = backend
    tiny_cfg.MODEL.PIXEL_MEAN, tiny_cfg.MODEL.PIXEL_STD = (0.1, 0.2, 0.3), (0.5, 0.3, 0.7)
    batch = next(iter(build_train_loader(tiny_cfg))).to("cpu")
    made = make_sheets(tiny_cfg, 4)
    assert list(made) == ["crops", "masks", "operations", "evaluation"]
    assert f"Backend {backend}." in sheets["Operations"]["notes"]
    tiles = [row.tiles for row in sheets["Crops"]["rows"]]
    assert sheets["Crops"]["columns"] == ["image", "global 1", "global 2", "local 1", "local 2"]
    for number in range(4):
        for view in range(2):
            expected = batch.global_crops[view * 4 + number].permute(1, 2, 0).numpy()
            assert np.array_equal(tiles[number][1 + view].pixels, expected)
            assert np.array_equal(
                tiles[number][3 + view].pixels, batch.local_crops[view * 4 + number].permute(1, 2, 0).numpy()
            )
    masked = [tile.caption for row in sheets["Masks"]["rows"] for tile in row.tiles]
    by_image = batch.masks.view(2, 4, -1).sum(-1).T.flatten().tolist()
    assert [0 if text == "no mask" else int(text.split()[0]) for text in masked] == by_image
    assert any(by_image)


def test_frames_are_where_the_crops_are_from(tiny_cfg: CfgNode, sheets: dict[str, dict[str, Any]]) -> None:
    tiny_cfg.merge_from_list(["INPUT.GLOBAL_CROPS.SCALE", (1.0, 1.0), "INPUT.CROP_RATIO", (1.0, 1.0)])
    make_sheets(tiny_cfg, 1)
    frames = sheets["Crops"]["rows"][0].tiles[0].frames
    assert [box for _, box in frames[:2]] == [(0, 0, 12, 12)] * 2
    assert len({colour for colour, _ in frames}) == 2
    assert len(frames) == 4


def test_the_note_tells_of_statistics_that_do_not_fit(tiny_cfg: CfgNode, sheets: dict[str, dict[str, Any]]) -> None:
    tiny_cfg.merge_from_list(["MODEL.PIXEL_MEAN", (9.0, 9.0, 9.0), "MODEL.PIXEL_STD", (1.0, 1.0, 1.0)])
    make_sheets(tiny_cfg, 2)
    mean = float(sheets["Crops"]["notes"].split("mean ")[1].split(",")[0])
    assert -9 < mean < -8


def test_every_operation_that_is_on_is_shown(tiny_cfg: CfgNode, sheets: dict[str, dict[str, Any]]) -> None:
    tiny_cfg.merge_from_list(["INPUT.COLOR_JITTER.HUE", 0.0, "INPUT.SOLARIZE.PROBS", (0.0, 0.0, 0.0)])
    make_sheets(tiny_cfg, 1)
    shown = {row.title: (len(row.tiles), row.lines) for row in sheets["Operations"]["rows"]}
    assert [name for name, (tiles, _) in shown.items() if not tiles] == ["hue", "solarize"]
    assert shown["solarize"][1] == ["off"]
    assert shown["blur"][1] == ["global 1: 0%", "global 2: 90%", "local: 50%"]
    brightness = next(row for row in sheets["Operations"]["rows"] if row.title == "brightness")
    assert [tile.caption for tile in brightness.tiles] == ["0.60", "0.80", "1.00", "1.20", "1.40"]
    means = [tile.pixels.mean() for tile in brightness.tiles]
    assert means == sorted(means)


def test_channels_have_a_sheet_and_what_needs_colours_is_left_out(
    tiny_cfg: CfgNode, tmp_path: Path, sheets: dict[str, dict[str, Any]]
) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", rng.integers(0, 500, (12, 12, 5), dtype=np.uint16))
    tiny_cfg.merge_from_list(["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", (0, 65535)])
    tiny_cfg.merge_from_list(["MODEL.PIXEL_MEAN", (0.5,) * 5, "MODEL.PIXEL_STD", (0.5,) * 5])
    tiny_cfg.merge_from_list(["DATASETS.TRAIN", f"folder:{tmp_path}:arrays=true", "DATASETS.TEST", "()"])
    assert list(make_sheets(tiny_cfg, 6)) == ["crops", "masks", "operations", "channels"]
    assert [len(row.tiles) for row in sheets["Channels"]["rows"]] == [5, 5], "there are two images"
    lines = {row.title: row.lines for row in sheets["Operations"]["rows"] if not row.tiles}
    assert set(lines) == {"saturation", "hue", "grey"}
    assert all(text == ["left out: it needs colours"] for text in lines.values())
    for name in ("Crops", "Channels", "Operations"):
        assert "4 magenta (" in sheets[name]["notes"]
    assert sheets["Crops"]["rows"][0].tiles[0].pixels.max() == 255, "0.8 % of the range is stretched to be seen"


def test_a_classifier_has_one_crop_and_its_label(tiny_cfg: CfgNode, sheets: dict[str, dict[str, Any]]) -> None:
    tiny_cfg.merge_from_list([word for key, value in TINY_CLASSIFIER.items() for word in (key, value)])
    assert list(make_sheets(tiny_cfg, 2)) == ["crops", "operations", "evaluation"]
    assert sheets["Crops"]["columns"] == ["image", "global 1"]
    assert sheets["Crops"]["rows"][0].lines[1].startswith("label ")
    assert [row.title for row in sheets["Operations"]["rows"]] == ["crop", "flip"]


def test_classes_of_masks_are_beside_the_evaluation_crop(
    tiny_cfg: CfgNode, tmp_path: Path, sheets: dict[str, dict[str, Any]]
) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.new("L", (12, 12), 1).save(tmp_path / name / "0.png")
    tiny_cfg.merge_from_list(["DATASETS.TEST", f"masks:{tmp_path}:num_classes=2"])
    make_sheets(tiny_cfg, 1)
    assert sheets["Evaluation"]["columns"] == ["image", "evaluation crop", "classes"]
    assert [tile.pixels.shape for tile in sheets["Evaluation"]["rows"][0].tiles] == [(12, 12, 3), (8, 8, 3), (8, 8, 3)]


def test_a_number_of_images_that_cannot_be(tiny_cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match="The number of images must be 1 or more, got 0"):
        make_sheets(tiny_cfg, 0)


def test_an_evaluation_set_of_other_channels_is_named(tiny_cfg: CfgNode, tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", np.zeros((40, 40, 2), dtype=np.uint8))
    tiny_cfg.merge_from_list(["INPUT.FORMAT", "channels", "INPUT.VALUE_RANGE", "(0, 255)"])
    tiny_cfg.MODEL.PIXEL_MEAN, tiny_cfg.MODEL.PIXEL_STD = (0.5, 0.5), (0.2, 0.2)
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (f"folder:{tmp_path}:arrays=true",), ("digits:split=test",)
    with pytest.raises(
        DataError, match=r"^digits:split=test\[0\] cannot be shown: it holds an array of shape \(8, 8, 1\)"
    ):
        make_sheets(tiny_cfg, 1)
