"""Many linear heads on the same frozen features, trained at once: the grid of DINOv2's linear evaluation.

B images of a batch    C classes    D width of a token    H learning rates
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinoengine.evaluation.classification import ranks_of
from dinoengine.modeling import head_input
from dinoengine.structures import BackboneOutput
from dinoengine.utils import comm
from dinoengine.utils.env import hash_seed

MOMENTUM = 0.9
INIT_STD = 0.01
REFERENCE_BATCH = 256  # the batch that base learning rates are for


def learning_rate(base_lr: float, batch_size: int) -> float:
    """The LR at the start: ``base_lr`` is for a global batch of 256 images."""
    return base_lr * batch_size / REFERENCE_BATCH


class HeadInput(NamedTuple):
    """What a head sees: the CLS tokens of the last blocks, and with ``mean_patch`` the mean patch token of the last."""

    num_blocks: int
    mean_patch: bool


@dataclass(frozen=True)
class HeadGrid:
    """Every base LR with every number of blocks, with and without mean patch token; by default the published 52.

    Heads are numbered input by input, within an input by LR.
    """

    base_lrs: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    num_last_blocks: tuple[int, ...] = (1, 4)
    mean_patch: tuple[bool, ...] = (False, True)

    @property
    def inputs(self) -> list[HeadInput]:
        return [HeadInput(*choice) for choice in itertools.product(self.num_last_blocks, self.mean_patch)]

    @property
    def heads(self) -> list[tuple[HeadInput, float]]:
        """(input, base LR) of each head."""
        return list(itertools.product(self.inputs, self.base_lrs))

    @property
    def names(self) -> list[str]:
        """One name per head; LRs are written in full, so that no two of them become one."""
        return [
            f"blocks{seen.num_blocks}-cls{'+mean' if seen.mean_patch else ''}-lr{base_lr!r}"
            for seen, base_lr in self.heads
        ]

    @property
    def max_blocks(self) -> int:
        return max(self.num_last_blocks)

    @property
    def width_in_tokens(self) -> int:
        """Tokens side by side in the features that all heads share."""
        return self.max_blocks + any(self.mean_patch)

    def features(self, model: nn.Module, images: Tensor) -> Tensor:
        """[B, width_in_tokens * D] float32: CLS tokens of the last blocks, oldest first, then the mean patch token.

        Each head sees consecutive columns of them (``columns``).

        Args:
            model: a FeatureModel; for the last block alone any images -> BackboneOutput.

        Raises:
            ValueError: if the mean patch token is wanted and there are no patch tokens.
        """
        if self.max_blocks == 1:
            return self.features_of([model(images)])
        return self.features_of(model.forward_last_blocks(images, self.max_blocks))  # type: ignore[operator]

    def features_of(self, outputs: list[BackboneOutput]) -> Tensor:
        """As ``features``, from the outputs of the last ``max_blocks`` blocks."""
        if any(self.mean_patch) and not outputs[-1].patch_tokens.shape[1]:
            raise ValueError("The backbone gives no patch tokens to average; set TEST.LINEAR.MEAN_PATCH (False,).")
        return head_input(outputs, any(self.mean_patch)).float()

    def columns(self, seen: HeadInput, embed_dim: int) -> slice:
        """Where a head's input lies in ``features``."""
        return slice((self.max_blocks - seen.num_blocks) * embed_dim, (self.max_blocks + seen.mean_patch) * embed_dim)


class LinearHeads:
    """The heads of a grid with their SGD (momentum 0.9, no weight decay), each trained as if it were alone.

    Weights are drawn from N(0, 0.01), the same for all LRs of an input and whatever else is in the grid; biases are 0.
    Heads of one input are one matrix product. Gradients are written out, so nothing here needs autograd:

        d loss / d logits = (softmax(logits) - one_hot(label)) / images of the global batch

    They are summed over processes: the heads are the same on all, to rounding those of a single process.
    """

    def __init__(
        self, grid: HeadGrid, embed_dim: int, num_classes: int, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.grid = grid
        self.num_classes = num_classes
        self._columns = [grid.columns(seen, embed_dim) for seen in grid.inputs]
        self._weights: list[Tensor] = []  # per input [H, C, its width]
        for seen, columns in zip(grid.inputs, self._columns, strict=True):
            generator = torch.Generator().manual_seed(hash_seed(seed, *seen))
            weight = torch.randn(num_classes, columns.stop - columns.start, generator=generator) * INIT_STD
            self._weights.append(weight.to(device).repeat(len(grid.base_lrs), 1, 1))
        self._biases = [torch.zeros(w.shape[:2], device=device) for w in self._weights]  # per input [H, C]
        self._momenta = [torch.zeros_like(parameter) for parameter in self._parameters()]

    def _parameters(self) -> list[Tensor]:
        return [*self._weights, *self._biases]

    def _logits(self, features: Tensor, number: int) -> Tensor:
        """[B, H, C] of the heads with input ``number``."""
        weight, bias = self._weights[number], self._biases[number]
        logits = F.linear(features[:, self._columns[number]], weight.flatten(0, 1), bias.flatten())
        return logits.view(len(features), *bias.shape)

    def step(self, features: Tensor, labels: Tensor, *, batch_size: int, lr_factor: float) -> Tensor:
        """One SGD step of every head, on all processes together.

        Args:
            features: [B, width] of this process's part of the batch, as ``HeadGrid.features`` makes them.
            labels: [B] int64.
            batch_size: images of the global batch.
            lr_factor: what ``learning_rate`` is multiplied by.

        Returns:
            [number of heads]: cross entropy before the step, mean over this process's part.
        """
        rows = torch.arange(len(labels), device=labels.device)
        losses, weight_grads, bias_grads = [], [], []
        for number in range(len(self._weights)):
            log_probs = self._logits(features, number).log_softmax(dim=2)  # [B, H, C]
            losses.append(-log_probs[rows, :, labels].mean(dim=0))
            grad = log_probs.exp_()
            grad[rows, :, labels] -= 1
            grad /= batch_size
            weight_grads.append((grad.flatten(1).T @ features[:, self._columns[number]]).view_as(self._weights[number]))
            bias_grads.append(grad.sum(dim=0))
        lrs = features.new_tensor([learning_rate(lr, batch_size) * lr_factor for lr in self.grid.base_lrs])  # [H]
        grads = [*weight_grads, *bias_grads]
        for parameter, momentum, grad in zip(self._parameters(), self._momenta, grads, strict=True):
            momentum.mul_(MOMENTUM).add_(comm.all_reduce_sum(grad))
            parameter.addcmul_(momentum, lrs.view(-1, *[1] * (parameter.dim() - 1)), value=-1)
        return torch.cat(losses)

    def ranks(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many classes each head puts before the right one.

        Args:
            labels: [B] int64, below 0 for what is no class of the heads.

        Returns:
            [B, number of heads] float32. A head that diverged ranks the right class last; NaN only where the features are
            not finite.
        """
        found = []
        for number in range(len(self._weights)):
            logits = self._logits(features, number)
            num_heads = logits.shape[1]
            found.append(ranks_of(logits.flatten(0, 1), labels.repeat_interleave(num_heads)).view(-1, num_heads))
        ranks = torch.cat(found, dim=1).nan_to_num(nan=self.num_classes)
        return ranks.masked_fill(~torch.isfinite(features).all(dim=1, keepdim=True), float("nan"))

    def diverged(self) -> list[bool]:
        """Whether a head has parameters that are not finite."""
        finite = [torch.isfinite(w).flatten(1).all(dim=1) for w in self._weights]
        return (~torch.cat(finite)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and momenta, on the CPU."""
        return {
            name: [tensor.cpu() for tensor in tensors]
            for name, tensors in (("parameters", self._parameters()), ("momenta", self._momenta))
        }

    def load_state_dict(self, state: dict[str, Sequence[Tensor]]) -> None:
        for name, tensors in (("parameters", self._parameters()), ("momenta", self._momenta)):
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)
