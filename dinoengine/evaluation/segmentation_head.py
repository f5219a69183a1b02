"""The head of the linear segmentation probe, and its training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.data import ImageDataset
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.structures import IGNORE, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_every_n_seconds

_INIT_STD = 0.01

# images [B, C, H, W] -> patch tokens [B, N, D] and their grid
PatchFeatures = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]


class FrozenInputBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, for inputs that need no gradient; any device.

    Then the statistics are constants to the backward pass, and sums over processes in the forward pass are all it takes.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """[R, D] float32 -> the same shape; R may differ between processes."""
        assert not rows.requires_grad
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = self.running_mean, self.running_var
        if self.training:
            exact = rows.double()
            sums = torch.cat([exact.sum(0), exact.square().sum(0), exact.new_tensor([len(rows)])])
            total, squares, count = comm.all_reduce_sum(sums).split([rows.shape[1], rows.shape[1], 1])
            mean64 = total / count
            var64 = squares / count - mean64.square()
            assert self.momentum is not None
            self.running_mean.lerp_(mean64.float(), self.momentum)
            self.running_var.lerp_((var64 * count / (count - 1).clamp(min=1)).float(), self.momentum)
            mean, var = mean64.float(), var64.clamp(min=0).float()
        return F.batch_norm(rows, mean, var, self.weight, self.bias, training=False, eps=self.eps)


class SegmentationHead(nn.Module):
    """BatchNorm and one linear layer on each patch token: DINOv2's linear head for segmentation."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = FrozenInputBatchNorm(dim)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.normal_(self.linear.weight, std=_INIT_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, D] -> scores [B, K, rows, columns]."""
        scores = self.linear(self.norm(tokens.flatten(0, 1).float()))  # [B * N, K]
        return scores.view(len(tokens), *grid, -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ProbeSchedule:
    """AdamW at a learning rate that rises linearly for ``warmup_iters`` and falls linearly to 0 ("poly", power 1).

    Attributes:
        seed: of the head's initial weights.
    """

    iters: int
    warmup_iters: int
    base_lr: float
    weight_decay: float
    seed: int

    def lr(self, iteration: int) -> float:
        """The learning rate of an iteration 0..iters-1."""
        rise = min(1.0, iteration / self.warmup_iters) if self.warmup_iters else 1.0
        return self.base_lr * (1.0 - iteration / self.iters) * rise


def train_segmentation_head(
    batches: Iterable[ImageBatch],
    patch_features: PatchFeatures,
    num_classes: int,
    schedule: ProbeSchedule,
    device: torch.device,
    dataset: ImageDataset | None = None,
) -> SegmentationHead:
    """A head in eval mode, the same on every process.

    The loss is the mean cross entropy over all pixels with a class of the batches of all processes.

    Args:
        batches: endless, with masks in 0..num_classes-1 or ``IGNORE``.
        patch_features: of a model that is not trained.
        dataset: that the batches are of, to name its images in an error.

    Raises:
        ValueError: on every process: if features are not finite, before a step with them (names the images), or the
            head's weights in the end.
    """
    head: SegmentationHead | None = None
    finite = FiniteCheck(dataset, "training features")
    parameters: list[nn.Parameter] = []
    optimizer: torch.optim.Optimizer | None = None
    for iteration, batch in zip(range(schedule.iters), batches, strict=False):
        batch = batch.to(device)
        assert batch.masks is not None
        with torch.no_grad():
            tokens, grid = patch_features(batch.images)
        finite.see(tokens, batch.indices)
        finite.finish_batch(device)
        if head is None or optimizer is None:  # now its width is known
            head = _new_head(tokens.shape[2], num_classes, schedule.seed).to(device)
            parameters = list(head.parameters())
            optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=schedule.weight_decay)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(iteration)
        scores = F.interpolate(head(tokens, grid), size=batch.masks.shape[1:], mode="bilinear", align_corners=False)
        num_pixels = comm.all_reduce_sum((batch.masks != IGNORE).sum()).clamp(min=1)
        loss = F.cross_entropy(scores, batch.masks.long(), ignore_index=IGNORE, reduction="sum") / num_pixels
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = comm.all_reduce_sum(gradient)
        optimizer.step()
        log_every_n_seconds(
            logging.INFO,
            f"Segmentation probe: iteration {iteration + 1} of {schedule.iters}",
            30,
            name=__name__,
            key="progress",
        )
    assert head is not None
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise ValueError(
            "The weights of the segmentation probe are not finite after its training: TEST.SEGMENTATION.BASE_LR "
            f"{schedule.base_lr} is too high."
        )
    return head.eval()


def _new_head(dim: int, num_classes: int, seed: int) -> SegmentationHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SegmentationHead(dim, num_classes)
