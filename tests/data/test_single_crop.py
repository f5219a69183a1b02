"""One crop per image, its label, and the loader that makes batches of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinoengine.config import CfgNode
from dinoengine.data import DataError, SingleCrop, build_dataset, build_train_loader
from dinoengine.structures import ImageBatch


def _crop(**options: Any) -> SingleCrop:
    settings: dict[str, Any] = {
        "image_format": "RGB",
        "size": (8, 6),
        "scale": (0.08, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "hflip_prob": 0.0,
        **options,
    }
    return SingleCrop(**settings)


def _picture(rows: int = 40, columns: int = 40) -> Image.Image:
    """Red rises with the row, green with the column."""
    y, x = np.mgrid[0:rows, 0:columns]
    return Image.fromarray(np.stack((y * 6, x * 6, y * 0), axis=-1).astype(np.uint8))


def test_a_whole_image_is_resized_and_flipped() -> None:
    crop = _crop(scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    (plain,), no_locals = crop(_picture(), np.random.default_rng(0))
    assert no_locals == []
    assert (plain.shape, plain.dtype) == ((3, 8, 6), torch.uint8)
    expected = np.asarray(_picture().resize((6, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(plain.numpy(), expected)
    crop.hflip_prob = 1.0
    (flipped,), _ = crop(_picture(), np.random.default_rng(0))
    assert torch.equal(flipped, plain.flip(-1))


def test_crops_cover_the_shares_asked_for_and_half_of_them_are_flipped() -> None:
    """The slope of red gives the height of the cropped region, that of green its width and whether it is flipped."""
    crop, rng = _crop(size=(8, 8), hflip_prob=0.5), np.random.default_rng(0)
    shares, flips = [], []
    for _ in range(300):
        (view,), _ = crop(_picture(), rng)
        rise = view.float().numpy()
        height = (rise[0, 6].mean() - rise[0, 1].mean()) / 6 / 5 * 8
        width = (rise[1, :, 6].mean() - rise[1, :, 1].mean()) / 6 / 5 * 8
        shares.append(height * abs(width) / 1600)
        flips.append(width < 0)
    assert 0.05 < min(shares) < 0.15
    assert 0.85 < max(shares) < 1.1
    assert 0.42 < np.mean(shares) < 0.54  # uniform in 0.08..1, but large ones that do not fit are drawn again
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)


def _batches(cfg: CfgNode, count: int = 3, **options: int) -> list[ImageBatch]:
    iterator = iter(build_train_loader(cfg, **options))
    return [next(iterator) for _ in range(count)]


def _columns(batches: list[ImageBatch]) -> list[Tensor]:
    assert all(batch.labels is not None for batch in batches)
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "indices")]


def test_labels_belong_to_their_images(classifier_cfg: CfgNode) -> None:
    dataset = build_dataset(classifier_cfg.DATASETS.TRAIN[0])
    classifier_cfg.merge_from_list(
        ["INPUT.GLOBAL_CROPS.SCALE", (1, 1), "INPUT.CROP_RATIO", (1, 1), "INPUT.HFLIP_PROB", 0]
    )
    images, labels, indices = _columns(_batches(classifier_cfg, 6))
    assert sorted(indices.tolist()) == list(range(24))  # one pass sees every image once
    assert labels.tolist() == [dataset.label(i) for i in indices.tolist()]
    crop = SingleCrop(classifier_cfg)
    for image, index in zip(images[:4], indices[:4].tolist(), strict=True):
        assert torch.equal(image, crop(dataset.load(index), np.random.default_rng(0))[0][0])


def test_batches_do_not_depend_on_workers_processes_or_where_a_run_resumes(classifier_cfg: CfgNode) -> None:
    alone = _columns(_batches(classifier_cfg))
    ranks = [_batches(classifier_cfg, rank=rank, world_size=2) for rank in (0, 1)]
    together = _columns([batch for pair in zip(*ranks, strict=True) for batch in pair])
    resumed = _columns(_batches(classifier_cfg, 2, start_iter=1))
    classifier_cfg.DATALOADER.NUM_WORKERS = 2
    with_workers = _columns(_batches(classifier_cfg))
    for first, *others in zip(alone, together, with_workers, strict=True):
        assert all(torch.equal(first, other) for other in others)
    for first, later in zip(alone, resumed, strict=True):
        assert torch.equal(first[4:], later)


def test_what_cannot_train_a_classifier_is_refused(classifier_cfg: CfgNode, tmp_path: Any) -> None:
    classifier_cfg.MODEL.CLASSIFIER.NUM_CLASSES = 4
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 4, but DATASETS\.TRAIN \['synthetic.*'\] has 3 classes"):
        build_train_loader(classifier_cfg)
    _picture().save(tmp_path / "one.png")
    classifier_cfg.DATASETS.TRAIN = (f"folder:{tmp_path}",)
    with pytest.raises(ValueError, match="has none .*one sub-folder per class"):
        build_train_loader(classifier_cfg)


def test_an_augmentation_of_several_views_is_refused(classifier_cfg: CfgNode) -> None:
    classifier_cfg.INPUT.AUGMENTATION = "MultiCrop"
    with pytest.raises(DataError, match="made 4 views of an image, .* set INPUT.AUGMENTATION SingleCrop"):
        next(iter(build_train_loader(classifier_cfg)))
