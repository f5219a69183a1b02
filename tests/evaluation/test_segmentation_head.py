from __future__ import annotations

import pytest
import torch
from torch import nn

from dinoengine.evaluation.segmentation_head import (
    FrozenInputBatchNorm,
    ProbeSchedule,
    SegmentationHead,
    train_segmentation_head,
)
from dinoengine.structures import IGNORE, ImageBatch
from tests.evaluation.dense_fakes import ColourPatches


def test_the_norm_is_pytorchs_in_both_modes_and_in_its_gradient() -> None:
    torch.manual_seed(0)
    ours, theirs = FrozenInputBatchNorm(4), nn.BatchNorm1d(4)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        rows = torch.randn(20, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + torch.tensor([0.0, 30.0, -1.0, 2.0])
        outputs = [norm(rows) for norm in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        for parameters in zip(ours.parameters(), theirs.parameters(), strict=True):
            gradients = [
                torch.autograd.grad(output.pow(3).sum(), parameter, retain_graph=True)
                for output, parameter in zip(outputs, parameters, strict=True)
            ]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(rows), theirs.eval()(rows))


def test_the_head_is_a_1x1_convolution_after_the_norm() -> None:
    head = SegmentationHead(3, 5).eval()
    tokens = torch.randn(2, 6, 3)
    picture = tokens.transpose(1, 2).reshape(2, 3, 2, 3)
    expected = nn.functional.conv2d(picture / (1 + 1e-5) ** 0.5, head.linear.weight[:, :, None, None], head.linear.bias)
    torch.testing.assert_close(head(tokens, (2, 3)), expected)


def test_the_learning_rate_by_hand() -> None:
    schedule = ProbeSchedule(iters=10, warmup_iters=4, base_lr=1.0, weight_decay=0.0, seed=0)
    expected = [0.0, 0.9 / 4, 0.8 / 2, 0.7 * 3 / 4, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [schedule.lr(i) for i in range(10)] == pytest.approx(expected)
    assert ProbeSchedule(iters=2, warmup_iters=0, base_lr=1.0, weight_decay=0.0, seed=0).lr(0) == 1.0


def _batch() -> ImageBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8, generator=generator)
    masks[0] = IGNORE
    return ImageBatch(images, None, torch.arange(2), masks)


def _patch_features(images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    output = ColourPatches()(images)
    return output.patch_tokens.detach(), output.grid


def _train(batch: ImageBatch, lr: float = 0.1, seed: int = 0) -> SegmentationHead:
    schedule = ProbeSchedule(iters=1, warmup_iters=0, base_lr=lr, weight_decay=0.0, seed=seed)
    return train_segmentation_head([batch], _patch_features, 2, schedule, torch.device("cpu"))


def test_one_step_is_adamw_on_the_mean_over_pixels_with_a_class() -> None:
    batch, start = _batch(), _train(_batch(), lr=1e-30)
    start.train()
    start.norm.reset_running_stats()
    optimizer = torch.optim.AdamW(start.parameters(), lr=0.1, weight_decay=0.0)
    scores = nn.functional.interpolate(start(*_patch_features(batch.images)), size=(8, 8), mode="bilinear")
    assert batch.masks is not None
    log_p = scores[1].log_softmax(0)  # image 0 is ignored
    loss = -sum(log_p[int(batch.masks[1, y, x]), y, x] for y in range(8) for x in range(8)) / 64
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    for name, value in _train(batch).state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], msg=name)


def test_the_seed_decides_the_start_and_nothing_else_random_does() -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(3)
        heads.append(_train(_batch(), seed=seed).linear.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_batch_without_any_class_changes_nothing_and_nan_is_an_error() -> None:
    batch = _batch()
    assert batch.masks is not None
    batch.masks.fill_(IGNORE)
    assert torch.equal(_train(batch).linear.bias, torch.zeros(2))
    batch = _batch()
    schedule = ProbeSchedule(iters=1, warmup_iters=0, base_lr=0.1, weight_decay=0.0, seed=0)
    with pytest.raises(ValueError, match=r"training features of 2 of 2 images are not finite, e\.g\. images number"):
        train_segmentation_head(
            [batch], lambda images: (torch.full((2, 4, 3), torch.nan), (2, 2)), 2, schedule, torch.device("cpu")
        )
