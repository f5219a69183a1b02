"""Batches and losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dinoengine.structures import BadImage, ImageBatch, LossTerm, LossTerms, ParamFacts, SSLBatch


def _batch(images: int = 4, local_views: int = 3, masks: bool = True) -> SSLBatch:
    # Each crop holds 10 * view + image, so its origin can be read off.
    def crops(views: int) -> torch.Tensor:
        values = torch.tensor([10.0 * v + i for v in range(views) for i in range(images)])
        return values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()

    return SSLBatch(
        global_crops=crops(2),
        local_crops=crops(local_views) if local_views else None,
        masks=(crops(2)[:, 0].flatten(1) % 2 == 1) if masks else None,
        positions=torch.arange(100, 100 + images),
        num_global_views=2,
        num_local_views=local_views,
    )


@pytest.mark.parametrize("local_views", [0, 3])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_split_keeps_images_together_and_views_apart(parts: int, local_views: int, masks: bool) -> None:
    size = 4 // parts
    for n, part in enumerate(_batch(4, local_views, masks).split(parts)):
        images = range(n * size, (n + 1) * size)
        assert part.positions.tolist() == [100 + i for i in images]
        assert part.global_crops[:, 0, 0, 0].tolist() == [10 * v + i for v in range(2) for i in images]
        if local_views:
            assert part.local_crops is not None
            assert part.local_crops[:, 0, 0, 0].tolist() == [10 * v + i for v in range(3) for i in images]
        if masks:
            assert part.masks is not None
            assert part.masks[:, 0].tolist() == [(10 * v + i) % 2 == 1 for v in range(2) for i in images]
        assert len(part) == size


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_masked_patches_are_those_of_nonzero(counted: bool, parts: int) -> None:
    masks = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    masks[3] = False
    batch = replace(_batch(), masks=masks)
    if counted:
        batch = batch.to("cpu")
        assert batch.num_masked == tuple(masks.sum(1).tolist())
    for part in batch.split(parts):
        assert part.masks is not None
        assert part.masked_patches().tolist() == part.masks.flatten().nonzero().flatten().tolist()


def test_a_counted_batch_asks_no_device() -> None:
    batch = replace(_batch(), masks=torch.ones(8, 6, dtype=torch.bool)).to("cpu").to("meta")
    assert batch.masked_patches().shape == (48,)  # a meta tensor has no values that could be asked for
    assert [part.num_masked for part in batch.split(4)] == [(6, 6)] * 4


def test_masked_patches_need_masks() -> None:
    with pytest.raises(ValueError, match=r"has no masks; see MaskPlan and INPUT\.MASK"):
        _batch(masks=False).masked_patches()


def test_uneven_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="Cannot split a batch of 4 images into 3 equal micro-batches"):
        _batch().split(3)
    with pytest.raises(ValueError, match="into 0 equal"):
        _batch().split(0)
    batch = _batch()
    batch.targets = object()
    with pytest.raises(ValueError, match="carries teacher targets already"):
        batch.split(2)


@pytest.mark.parametrize("labels", [torch.arange(6), None])
def test_single_images_are_split_with_their_labels(labels: torch.Tensor | None) -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1)
    masks = None if labels is None else labels[:, None, None].to(torch.uint8)
    parts = ImageBatch(images, labels, torch.arange(10, 16), masks).split(3)
    assert [part.images.flatten().tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part.indices.tolist() for part in parts] == [[10, 11], [12, 13], [14, 15]]
    for part in parts:
        assert labels is None if part.labels is None else part.labels.tolist() == part.images.flatten().tolist()
        assert masks is None if part.masks is None else part.masks.flatten().tolist() == part.labels.tolist()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="Cannot split a batch of 6 images into 4"):
        ImageBatch(images, labels, torch.arange(6)).split(4)


def test_to_moves_every_tensor_and_nothing_else() -> None:
    moved = _batch(masks=False).to("meta")
    assert moved.global_crops.is_meta
    assert moved.local_crops is not None
    assert moved.local_crops.is_meta
    assert moved.positions.is_meta
    assert moved.masks is None
    assert (moved.num_global_views, moved.num_local_views) == (2, 3)
    images = ImageBatch(torch.zeros(2, 1, 1, 1), None, torch.arange(2), torch.zeros(2, 1, 1)).to("meta")
    assert images.images.is_meta
    assert images.masks is not None
    assert images.masks.is_meta
    assert images.labels is None
    assert len(images) == 2


def test_losses_add_up_weighted() -> None:
    terms = LossTerms([LossTerm("a", torch.tensor(2.0), 0.5), LossTerm("b", torch.tensor(3.0), 2.0)])
    assert terms.total().item() == 7.0
    assert {name: v.item() for name, v in terms.contributions()} == {"loss_a": 1.0, "loss_b": 6.0}


def test_no_terms_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"every loss weight under MODEL\.LOSS is 0"):
        LossTerms([]).total()


def test_default_facts_give_the_full_learning_rate() -> None:
    facts = ParamFacts()
    assert facts.num_layers + 1 - facts.layer_id == 0


@pytest.mark.parametrize("kind", ["crops", "images"])
def test_bad_images_stay_with_a_batch(kind: str) -> None:
    bad = (BadImage(101, "/a/1.jpg", "the file is empty"),)
    batch = _batch() if kind == "crops" else ImageBatch(torch.zeros(4, 1, 2, 2), None, torch.arange(4))
    assert batch.bad_images == ()
    batch = replace(batch, bad_images=bad)
    moved: list[SSLBatch | ImageBatch] = [batch.to("meta"), *batch.split(2)]
    assert [part.bad_images for part in moved] == [bad] * 3


def test_record_stream_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], str]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: seen.append((tuple(self.shape), stream)))
    ImageBatch(torch.zeros(2, 1, 4, 4), None, torch.arange(2)).record_stream("side")
    SSLBatch(torch.zeros(4, 1, 4, 4), torch.zeros(2, 1, 2, 2), None, torch.arange(2), 2, 1).record_stream("side")
    assert seen == [
        ((2, 1, 4, 4), "side"),
        ((2,), "side"),
        ((4, 1, 4, 4), "side"),
        ((2, 1, 2, 2), "side"),
        ((2,), "side"),
    ]
