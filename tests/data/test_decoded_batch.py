"""Crops made on a device are those of the published pipeline, and nothing but where they are made is another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dinoengine.config import CfgNode, get_cfg
from dinoengine.data import MultiCrop, SingleCrop, build_train_loader, decoded_batch
from dinoengine.data.collate import CropSample, LabelledImage, SSLCollate, collate_images
from dinoengine.data.crop_recipe import CropRecipe, render_reference
from dinoengine.data.crop_tables import pending_crops
from dinoengine.data.decoded_batch import DecodedBatch, made_crops
from dinoengine.data.random_streams import CROPS, position_rng
from dinoengine.structures import BadImage, ImageBatch, SSLBatch
from tests.data.pictures import picture

SIZES = ((64, 80), (50, 33), (120, 91), (16, 16))
BOX, CROP = (3, 5, 40, 52), (32, 32)
# Every operation alone after a resize, then some together; the largest mean difference, in levels.
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "crop": ({}, 0.01),
    "flip": ({"flip": True}, 0.01),
    **{name: ({"jitter": ((name, 1.3),)}, 0.05) for name in ("brightness", "contrast", "saturation")},
    "hue": ({"jitter": (("hue", -0.08),)}, 0.1),
    "grey": ({"grey": True}, 0.01),
    "blur": ({"blur": (9, 1.1)}, 0.01),
    "solarize": ({"solarize": 128}, 0.1),
    "two orders": ({"jitter": (("hue", 0.05), ("contrast", 0.7), ("saturation", 1.2), ("brightness", 0.8))}, 0.1),
    "all": (
        {"flip": True, "jitter": (("brightness", 1.4), ("hue", 0.1)), "blur": (9, 0.4), "grey": True, "solarize": 100},
        0.1,
    ),
}  # fmt: skip


def _image(number: int = 0, size: tuple[int, int] = SIZES[0], mode: str = "RGB") -> Image.Image:
    image: Image.Image = picture(number).convert("RGB").resize(size[::-1])
    if mode == "RGBA":
        image.putalpha(picture(number + 1).convert("L").resize(size[::-1]))
        return image
    return image.convert(mode)


def _cfg(backend: str, *overrides: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.GLOBAL_CROPS.SIZE_PX", (48,), "INPUT.LOCAL_CROPS.SIZE_PX", (24,), "SEED", 0])
    cfg.merge_from_list(["INPUT.LOCAL_CROPS.NUM", 2, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"])
    cfg.merge_from_list(["INPUT.AUGMENTATION_BACKEND", backend, *overrides])
    return cfg


def _sample(position: int, image: Image.Image, backend: str, *overrides: Any) -> CropSample:
    crops = MultiCrop(_cfg(backend, *overrides))(image, position_rng(0, position, CROPS))
    return CropSample(position, position, *crops)


def _batch(samples: list[CropSample]) -> SSLBatch:
    batch = SSLCollate(None)(samples).to("cpu")
    assert isinstance(batch, SSLBatch)
    return batch


# ---- the same crops


@pytest.mark.parametrize("name", RECIPES)
def test_an_operation_is_that_of_the_reference(name: str) -> None:
    changes, most = RECIPES[name]
    for number in range(3):
        recipe = CropRecipe(BOX, CROP, **changes)
        (found,) = made_crops(pending_crops(_image(number), [recipe]))
        difference = (found.int() - render_reference(_image(number), recipe).int()).abs()
        assert found.dtype == torch.uint8
        assert difference.float().mean() <= most
        # A level at the threshold of solarize may be inverted on one side only.
        assert difference.max() <= (8 if name in ("hue", "two orders") else 255 if changes.get("solarize") else 2)


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1), ("RGBA", 4)])
def test_crops_of_random_recipes_and_sizes_are_those_of_the_reference(mode: str, channels: int) -> None:
    statistics = ("MODEL.PIXEL_MEAN", (0.5,) * channels, "MODEL.PIXEL_STD", (0.5,) * channels, "INPUT.FORMAT", mode)
    batches = [
        _batch([_sample(i, _image(i, SIZES[i % 4], mode), backend, *statistics) for i in range(12)])
        for backend in ("reference", "device")
    ]
    for name, shape in (("global_crops", (24, channels, 48, 48)), ("local_crops", (24, channels, 24, 24))):
        expected, found = (getattr(batch, name) for batch in batches)
        assert (found.shape, found.dtype, found.is_contiguous()) == (shape, torch.uint8, True)
        means = (found.int() - expected.int()).abs().float().flatten(1).mean(1)
        assert means.mean() < 0.02
        assert means.max() < 0.5  # one level of the mean that contrast goes by moves all pixels
    assert torch.equal(batches[0].positions, batches[1].positions)


def test_a_batch_of_several_sizes_is_what_each_image_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [_sample(i, _image(i, size), "device") for i, size in enumerate(SIZES)]
    together = _batch(samples)
    for number, sample in enumerate(samples):
        alone = _batch([sample])
        assert torch.equal(together.global_crops[number::4], alone.global_crops)
        assert together.local_crops is not None
        assert alone.local_crops is not None
        assert torch.equal(together.local_crops[number::4], alone.local_crops)
        assert torch.equal(torch.stack(made_crops([*sample.global_crops])), alone.global_crops)
    monkeypatch.setattr(decoded_batch, "MAX_VALUES", 1)  # one crop at a time
    monkeypatch.setattr("dinoengine.data.crop_tables.MAX_VALUES", 1)
    assert torch.equal(_batch(samples).global_crops, together.global_crops)


def test_a_loop_may_take_the_batch_within_autocast() -> None:
    samples = [_sample(i, _image(i, size), "device") for i, size in enumerate(SIZES)]
    expected = _batch(samples).global_crops
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_batch(samples).global_crops, expected)


def test_single_crops_keep_labels_indices_and_masks() -> None:
    def labelled(backend: str) -> ImageBatch:
        augmentation = SingleCrop(_cfg(backend))
        images = [
            LabelledImage(augmentation(_image(i), position_rng(0, i, CROPS))[0][0], i % 2, 7 + i, torch.full((4, 4), i))
            for i in range(3)
        ]
        collated = collate_images(images)
        assert len(collated) == 3
        batch = collated.to("cpu")
        assert isinstance(batch, ImageBatch)
        return batch

    expected, found = labelled("reference"), labelled("device")
    assert found.labels is not None
    assert found.masks is not None
    assert (found.labels.tolist(), found.indices.tolist()) == ([0, 1, 0], [7, 8, 9])
    assert found.masks[:, 0, 0].tolist() == [0, 1, 2]
    assert (found.images.int() - expected.images.int()).abs().float().mean() < 0.02


# ---- the batch on its way


def _decoded(num: int = 3) -> DecodedBatch:
    samples = [_sample(i, _image(i), "device") for i in range(num)]
    bad = (BadImage(0, "a.jpg", "empty"),)
    batch = SSLCollate(None)([samples[0]._replace(bad_images=bad), *samples[1:]])
    assert isinstance(batch, DecodedBatch)
    return batch


def test_what_is_not_pixels_goes_through() -> None:
    decoded = _decoded()
    assert len(decoded) == 3
    batch = decoded.to("cpu")
    assert batch.bad_images == (BadImage(0, "a.jpg", "empty"),)
    assert isinstance(batch, SSLBatch)
    assert (batch.num_global_views, batch.num_local_views, len(batch.split(3))) == (2, 2, 3)


def test_the_host_never_asks_the_device() -> None:
    """Tensors of "meta" have shapes and no values: whatever would read one is an error there."""
    batch = _decoded().to("meta")
    assert isinstance(batch, SSLBatch)
    assert (batch.global_crops.device.type, batch.global_crops.shape) == ("meta", (6, 3, 48, 48))
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.global_crops.max().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_crops_of_a_gpu_are_those_of_the_cpu_and_nothing_waits_for_it(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    decoded = _decoded()
    expected, copied = decoded.to("cpu"), decoded.copied_to("cuda")
    torch.set_float32_matmul_precision(precision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = copied.with_crops()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(before)
    assert isinstance(expected, SSLBatch)
    assert isinstance(found, SSLBatch)
    assert torch.equal(found.global_crops.cpu(), expected.global_crops)


def test_all_its_tensors_are_pinned_and_known_to_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    known: list[tuple[Any, Any]] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: known.append((tensor.data_ptr(), stream)))
    decoded = _decoded().pin_memory()
    tensors = [*decoded.tables, *(v for v in vars(decoded.rest).values() if isinstance(v, Tensor))]
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned}
    decoded.record_stream("side")
    assert known == [(tensor.data_ptr(), "side") for tensor in tensors]


def test_workers_send_it_and_a_loader_starts_anywhere() -> None:
    options = ("DATASETS.TRAIN", "synthetic:num_images=12:num_classes=2:size=50", "SOLVER.IMS_PER_BATCH", 4)

    def batches(num_workers: int, start_iter: int, count: int) -> list[Any]:
        loader = iter(build_train_loader(_cfg("device", *options, "DATALOADER.NUM_WORKERS", num_workers), start_iter))
        return [next(loader).to("cpu") for _ in range(count)]

    expected = batches(0, 0, 2)
    for one, other in zip(expected[1:], batches(1, 1, 1), strict=True):
        assert torch.equal(one.global_crops, other.global_crops)
        assert torch.equal(one.masks, other.masks)
    reference = next(iter(build_train_loader(_cfg("reference", *options))))
    assert torch.equal(reference.masks, expected[0].masks)
    assert np.abs(reference.global_crops.numpy().astype(int) - expected[0].global_crops.numpy()).mean() < 0.02
