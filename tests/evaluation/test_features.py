from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from dinoengine.config import get_cfg
from dinoengine.data import build_test_loader
from dinoengine.evaluation import FeatureCollector, extract_features, extract_pixels
from dinoengine.modeling.backbone import VisionTransformer
from dinoengine.modeling.layers.pixel_norm import PixelNorm
from dinoengine.modeling.meta_arch.feature_model import FeatureModel
from dinoengine.structures import ImageBatch
from tests.evaluation.fakes import LinearFeatures, identity_features, make_loader

ROWS = torch.arange(14, dtype=torch.float32).view(7, 2)
LABELS = torch.tensor([5, -3, 5, 900, 0, -3, 1])


def _vit() -> FeatureModel:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=(16, 16), patch_size=8, embed_dim=8, depth=2, num_heads=2)
    return FeatureModel(PixelNorm([0.5] * 3, [0.25] * 3), backbone).eval()


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("order", [None, [6, 0, 3, 5, 1, 2, 4]])
def test_rows_stand_in_dataset_order_whatever_the_loader_does(batch_size: int, order: list[int] | None) -> None:
    found = extract_features(identity_features(2), make_loader(ROWS, LABELS, batch_size, order))
    assert torch.equal(found.features, ROWS)
    assert found.labels is not None
    assert torch.equal(found.labels, LABELS)
    assert len(found) == 7


def test_features_are_float32_on_the_cpu_also_of_a_bf16_model() -> None:
    found = extract_features(LinearFeatures(torch.eye(2).bfloat16()).eval(), make_loader(ROWS, LABELS))
    assert found.features.dtype == torch.float32
    assert found.features.device.type == "cpu"
    assert torch.equal(found.features, ROWS)  # small whole numbers survive bf16
    assert found.labels is not None
    assert found.labels.dtype == torch.int64


def test_features_carry_no_gradient_and_the_model_keeps_its_mode() -> None:
    model = identity_features(2).train()
    model.dropout.eval()
    found = extract_features(model, make_loader(ROWS, LABELS))
    assert not found.features.requires_grad
    assert model.training
    assert not model.dropout.training


def test_the_feature_is_the_cls_token_after_the_final_norm() -> None:
    model = _vit()
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = extract_features(model, [ImageBatch(images, None, torch.arange(5))])
    with torch.no_grad():
        torch.testing.assert_close(found.features, model(images).cls_token)
    # A fresh LayerNorm leaves mean 0 and variance 1 in every row.
    torch.testing.assert_close(found.features.mean(dim=1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.features.var(dim=1, unbiased=False), torch.ones(5), rtol=1e-2, atol=0)


def test_patch_tokens_are_averaged_or_stand_side_by_side() -> None:
    model = _vit()
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = ImageBatch(images, None, torch.arange(5))
    with torch.no_grad():
        tokens = model(images).patch_tokens
    num_patches = tokens.shape[1]
    assert num_patches > 1
    side_by_side = extract_features(model, [batch], "patch").features.view(5, num_patches, -1)
    torch.testing.assert_close(side_by_side, tokens)
    torch.testing.assert_close(extract_features(model, [batch], "mean_patch").features, side_by_side.mean(1))
    with pytest.raises(ValueError, match="one of cls, mean_patch, patch; got 'register'"):
        extract_features(model, [batch], "register")


@pytest.mark.parametrize("num_images", [1, 5, 9])
def test_a_real_loader_of_an_odd_size_gives_every_image_once(num_images: int) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.IMS_PER_BATCH=4", "DATALOADER.NUM_WORKERS=0"])
    cfg.merge_from_list(["INPUT.TEST.RESIZE_PX=0", "INPUT.TEST.CROP_SIZE_PX=16"])
    name = f"synthetic:num_images={num_images}:num_classes=3:size=16"
    found = extract_features(_vit(), build_test_loader(cfg, name))
    assert found.features.shape == (num_images, 8)
    assert found.labels is not None
    assert found.labels.tolist() == [i % 3 for i in range(num_images)]


# --- labels ------------------------------------------------------------------------------------------------------


def test_a_dataset_without_labels_has_none() -> None:
    assert extract_features(identity_features(2), make_loader(ROWS, None)).labels is None
    assert extract_pixels(make_loader(ROWS, None)).labels is None


def test_labels_that_only_some_images_have_are_no_labels() -> None:
    loader = make_loader(ROWS, LABELS, batch_size=4)
    loader[1].labels = None
    found = extract_features(identity_features(2), loader)
    assert found.labels is None
    assert torch.equal(found.features, ROWS)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
def test_an_image_twice_or_missing_is_an_error(order: list[int]) -> None:
    collector = FeatureCollector()
    collector.add(torch.zeros(7, 2), LABELS, torch.tensor(order))
    with pytest.raises(ValueError, match="did not give every image of the dataset exactly once"):
        collector.finish()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_name_their_images(bad: float) -> None:
    rows = ROWS.clone()
    rows[2, 1] = rows[5] = bad
    loader = make_loader(rows, LABELS, batch_size=2, order=[6, 5, 4, 3, 2, 1, 0])
    with pytest.raises(ValueError, match=r"features of 2 of 7 images are not finite, e.g. images number \[2, 5\]"):
        extract_pixels(loader)


def test_only_the_first_bad_images_are_listed() -> None:
    loader = make_loader(torch.full((50, 2), float("nan")), None)
    with pytest.raises(ValueError, match=r"50 of 50 images are not finite, e.g. images number \[0, 1, 2, 3, 4\]\."):
        extract_pixels(loader)


# --- pixels ------------------------------------------------------------------------------------------------------


def test_pixels_are_the_flattened_crops_in_their_own_units() -> None:
    images = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extract_pixels([ImageBatch(images, torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1]))])
    assert found.features.dtype == torch.float32
    assert found.features.tolist() == [images[i].flatten().tolist() for i in (1, 2, 0)]
    assert found.labels is not None
    assert found.labels.tolist() == [2, 3, 1]


# --- the collector -----------------------------------------------------------------------------------------------


def _cls_of(tokens: Tensor) -> Tensor:
    """What VisionTransformer returns as cls_token: a view of all its tokens."""
    return tokens[:, 0]


def test_a_collector_is_empty_after_it_was_finished() -> None:
    collector = FeatureCollector()
    collector.add(ROWS[3:], None, torch.arange(3, 7))
    collector.add(ROWS[:3], None, torch.arange(3))
    assert torch.equal(collector.finish().features, ROWS)
    with pytest.raises(ValueError, match="did not give every image"):
        collector.finish()
    collector.add(ROWS[:1], LABELS[:1], torch.tensor([0]))
    again = collector.finish()
    assert torch.equal(again.features, ROWS[:1])
    assert torch.equal(again.labels, LABELS[:1])  # type: ignore[arg-type]


def test_a_collector_holds_its_rows_and_not_the_tokens_they_were_cut_from() -> None:
    tokens = torch.zeros(16, 197, 64)
    collector = FeatureCollector()
    collector.add(_cls_of(tokens), None, torch.arange(16))
    assert len(pickle.dumps(collector)) < 2 * _cls_of(tokens).numel() * 4


def test_a_collector_is_not_changed_by_what_happens_to_a_batch_later() -> None:
    buffer = torch.ones(2, 3)
    collector = FeatureCollector()
    collector.add(buffer, None, torch.arange(2))
    buffer.zero_()  # a model that writes into the same output buffer for every batch
    assert torch.equal(collector.finish().features, torch.ones(2, 3))
