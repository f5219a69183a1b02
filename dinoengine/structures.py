"""The types that cross package borders.

data, modeling and solver never import each other; they meet here. Shapes use these letters everywhere:

    B   images in the batch (per rank, or per micro-batch after ``split``)
    G   global views per image (2 in the DINO family)
    L   local views per image (may be 0)
    C   image channels           H, W   global crop size in pixels      h, w   local crop size in pixels
    N   patch tokens of a crop   R      register tokens                 D      feature width
    M   masked patch tokens of all global crops of the batch
    K   prototypes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# The class of a pixel that counts neither in training nor in a result; masks have the classes 0..254.
IGNORE = 255

Batch = TypeVar("Batch", "SSLBatch", "ImageBatch")


def _record_stream(batch: SSLBatch | ImageBatch, stream: Any) -> None:
    for value in (getattr(batch, f.name) for f in fields(batch)):
        if isinstance(value, Tensor):
            value.record_stream(stream)


def _map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """A copy of a dataclass with ``function`` applied to each of its tensors."""
    values: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    changed: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
    return replace(batch, **changed)


class Sample(NamedTuple):
    """One item of a dataset: a ``PIL.Image`` and its label, or None where the dataset has no labels."""

    image: Any
    label: int | None


class BadImage(NamedTuple):
    """An image of the training set that could not be used, so that another one took its place.

    Attributes:
        position: in the sample stream, for which an image was looked for.
        path: what the dataset calls the image.
        cause: why it cannot be used.
    """

    position: int
    path: str
    cause: str


@dataclass
class SSLBatch:
    """One training batch of crops and masks.

    Global crops are view-major: all first views of the B images, then all second views. Local crops are
    crop-major in the same way. ``chunk(G)`` therefore separates the views, which the cross-view losses rely on.

    Attributes:
        global_crops: [G*B, C, H, W], uint8 (with INPUT.FORMAT channels float32 in 0..1).
        local_crops: [L*B, C, h, w], same dtype; None when there are no local views.
        masks: [G*B, N] bool, True where the student sees the mask token; None when masking is off.
        positions: [B] int64, position of each image in the sample stream.
        num_global_views: G.
        num_local_views: L.
        targets: what ``StudentTeacher.split_batch`` attaches when a step runs in several micro-batches; None otherwise.
        bad_images: those that others of the batch as the loader made it have replaced.
        sources: [B] int64, which entry of DATASETS.TRAIN each image is from; None if there is one.
        num_masked: masked patches of each global crop, known to the host so that no device must be asked for it; None
            where nobody has counted yet.
    """

    global_crops: Tensor
    local_crops: Tensor | None
    masks: Tensor | None
    positions: Tensor
    num_global_views: int = 2
    num_local_views: int = 0
    targets: Any = None
    bad_images: tuple[BadImage, ...] = ()
    sources: Tensor | None = None
    num_masked: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of images B (not of crops)."""
        return self.positions.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SSLBatch:
        """The same batch with every tensor on ``device``; ``num_masked`` is counted before."""
        counted = replace(self, num_masked=self._count_masked())
        return _map_tensors(counted, lambda t: t.to(device, non_blocking=non_blocking))

    def masked_patches(self) -> Tensor:
        """[M] int64: indices of the masked patches among all G*B*N patches, ascending.

        Raises:
            ValueError: if the batch has no masks.
        """
        if self.masks is None:
            raise ValueError("This batch has no masks; see MaskPlan and INPUT.MASK.")
        counts = self._count_masked()
        assert counts is not None
        # A sort, because nonzero would make the host wait for the device to learn how many there are.
        order = self.masks.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        return order[: sum(counts)]

    def _count_masked(self) -> tuple[int, ...] | None:
        if self.masks is None or self.num_masked is not None:
            return self.num_masked
        return tuple(self.masks.sum(1).tolist())

    def pin_memory(self) -> SSLBatch:
        """Called by the DataLoader when ``pin_memory=True``."""
        return _map_tensors(self, lambda t: t.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Tell torch's allocator that a CUDA stream, on which this batch was not made, uses its tensors."""
        _record_stream(self, stream)

    def split(self, num_parts: int) -> list[SSLBatch]:
        """Cut into ``num_parts`` batches of B / num_parts consecutive images each, keeping the view-major layout.

        Raises:
            ValueError: if B is not divisible by ``num_parts``, or targets are attached already.
        """
        _require_divisible(len(self), num_parts)
        if self.targets is not None:
            raise ValueError("This batch carries teacher targets already; split it before they are attached.")

        def parts(t: Tensor | None, views: int) -> list[Any]:
            if t is None:
                return [None] * num_parts
            # [views*B, ...] -> [views, parts, B/parts, ...]
            grouped = t.reshape(views, num_parts, len(self) // num_parts, *t.shape[1:])
            return [grouped[:, i].reshape(-1, *t.shape[1:]) for i in range(num_parts)]

        counts, size = self._count_masked(), len(self) // num_parts

        def count_of_part(first: int) -> tuple[int, ...] | None:
            if counts is None:
                return None
            return tuple(n for view in range(0, len(counts), len(self)) for n in counts[view + first :][:size])

        columns = zip(
            parts(self.global_crops, self.num_global_views),
            parts(self.local_crops, self.num_local_views),
            parts(self.masks, self.num_global_views),
            self.positions.chunk(num_parts),
            parts(self.sources, 1),
            [count_of_part(i * size) for i in range(num_parts)],
            strict=True,
        )
        return [
            replace(self, global_crops=g, local_crops=lo, masks=m, positions=p, sources=s, num_masked=n)
            for g, lo, m, p, s, n in columns
        ]


@dataclass
class ImageBatch:
    """One batch of single images, for evaluation or for training with labels.

    Attributes:
        images: [B, C, H, W], uint8 (or float in 0..1).
        labels: [B] int64, or None for a dataset without labels. A batch that ``BatchMixing`` has mixed holds the
            probability of each class instead, [B, classes] float32.
        indices: [B] int64, index of each image in its dataset.
        masks: [B, H, W] uint8, the class of each pixel of the image, ``IGNORE`` where there is none; None for a dataset
            without masks.
        bad_images, sources: see ``SSLBatch``.
    """

    images: Tensor
    labels: Tensor | None
    indices: Tensor
    masks: Tensor | None = None
    bad_images: tuple[BadImage, ...] = ()
    sources: Tensor | None = None

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch with every tensor on ``device``."""
        return _map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ImageBatch:
        """Called by the DataLoader when ``pin_memory=True``."""
        return _map_tensors(self, lambda t: t.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Tell torch's allocator that a CUDA stream, on which this batch was not made, uses its tensors."""
        _record_stream(self, stream)

    def split(self, num_parts: int) -> list[ImageBatch]:
        """Cut into ``num_parts`` batches of B / num_parts consecutive images each.

        Raises:
            ValueError: if B is not divisible by ``num_parts``.
        """
        _require_divisible(len(self), num_parts)

        def parts(t: Tensor | None) -> list[Any]:
            return [None] * num_parts if t is None else list(t.chunk(num_parts))

        columns = zip(*map(parts, (self.images, self.labels, self.indices, self.masks, self.sources)), strict=True)
        return [replace(self, images=i, labels=la, indices=n, masks=m, sources=s) for i, la, n, m, s in columns]


def _require_divisible(num_images: int, num_parts: int) -> None:
    if num_parts < 1 or num_images % num_parts:
        raise ValueError(
            f"Cannot split a batch of {num_images} images into {num_parts} equal micro-batches; "
            "make SOLVER.IMS_PER_BATCH divisible by (world size x SOLVER.NUM_MICRO_BATCHES)."
        )


@dataclass
class BackboneOutput:
    """What every backbone returns; all tokens after the final norm.

    Attributes:
        cls_token: [B, D].
        register_tokens: [B, R, D]; R may be 0.
        patch_tokens: [B, N, D], row-major over ``grid``.
        grid: (rows, columns) of the patch grid; rows * columns == N.
    """

    cls_token: Tensor
    register_tokens: Tensor
    patch_tokens: Tensor
    grid: tuple[int, int]


class PickedTokens(NamedTuple):
    """The tokens of some crops that a loss looks at, after the final norm.

    Attributes:
        cls_token: [B, D].
        patches: [M, D], those that were asked for; M may be 0.
    """

    cls_token: Tensor
    patches: Tensor


@dataclass
class ClassifierOutput(BackboneOutput):
    """What the feature model of a classifier returns: the tokens of the last block, and what its head makes of them.

    Attributes:
        logits: [B, number of classes].
    """

    logits: Tensor


class LossTerm(NamedTuple):
    """One term of the objective: a scalar tensor and its weight; it contributes ``weight * value``."""

    name: str
    value: Tensor
    weight: float


@dataclass
class LossTerms:
    """What a meta-architecture returns in training.

    ``total`` is what the engine differentiates. What it logs as ``loss_<name>`` is the contribution
    ``weight * value``, so the logged terms add up to the logged ``total_loss`` exactly as optimised.

    Attributes:
        terms: the objective, in a fixed order.
        metrics: diagnostics, scalar tensors without gradient; logged under their own name, never optimised.
        per_image: [B] what each image adds, without gradient: ``total`` is their mean. None if the batch has no
            ``sources``, by which the engine would log it, or the model does not say.
    """

    terms: list[LossTerm]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    per_image: Tensor | None = None

    def total(self) -> Tensor:
        """Sum of ``weight * value``, a scalar."""
        if not self.terms:
            raise ValueError("The model returned no loss term: every loss weight under MODEL.LOSS is 0.")
        return torch.stack([c for _, c in self.contributions()]).sum()

    def contributions(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of (``loss_<name>``, ``weight * value``)."""
        for term in self.terms:
            yield f"loss_{term.name}", term.value * term.weight


@dataclass(frozen=True)
class ParamFacts:
    """What a model knows about one of its parameters; the solver turns it into LR and weight decay.

    Attributes:
        layer_id: 0 for embeddings, i + 1 for block i, num_layers + 1 for the final norm and heads.
        num_layers: number of blocks; the LR factor is ``LAYER_DECAY ** (num_layers + 1 - layer_id)``.
        weight_decay: False for biases, norms and LayerScale.
        role: "" or "patch_embed" (own LR multiplier) or "last_layer" (frozen for the first iterations).
        in_backbone: whether it may be frozen while heads warm up (SOLVER.BACKBONE_FREEZE_ITERS).
    """

    layer_id: int = 0
    num_layers: int = -1
    weight_decay: bool = True
    role: str = ""
    in_backbone: bool = False
