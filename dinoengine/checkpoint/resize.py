"""The same model for another image size, patch size, number of channels or of registers, run against the old one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinoengine.checkpoint.convert import require_place, save_weights
from dinoengine.checkpoint.files import FileContent
from dinoengine.checkpoint.layouts import LAYOUTS, Hints, detect_layout
from dinoengine.checkpoint.output import require_agreement, require_free
from dinoengine.checkpoint.parity import Comparison, compare_tensors, tokens_of_backbone
from dinoengine.checkpoint.patch_kernel import repeat_channels, resample_patches
from dinoengine.checkpoint.reading import read_content
from dinoengine.checkpoint.resize_steps import with_channels, with_patch_size, with_registers, with_table_grid
from dinoengine.checkpoint.weights import BackboneSpec, Weights, grid_of, is_backbone
from dinoengine.config import cfg_from_text
from dinoengine.config.config import flatten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What is wanted; None leaves it as it is.

    Attributes:
        img_size: (rows, columns) in pixels that the position table is for.
        patch_size: edge in pixels.
        num_registers: the number there shall be.
    """

    img_size: tuple[int, int] | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    num_registers: int | None = None

    def grid(self, spec: BackboneSpec) -> tuple[int, int]:
        """(rows, columns) of the new position table.

        Raises:
            ValueError: for a number below 1, a size that is no multiple of the patch, fewer registers than there are.
        """
        patch_size = self.patch_size if self.patch_size is not None else spec.patch_size
        rows, columns = self.img_size if self.img_size is not None else spec.img_size
        numbers = {"patch size": patch_size, "number of channels": self.in_chans, "image size": min(rows, columns)}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"The {name} must be at least 1; got {value}.")
        grid = grid_of((rows, columns), patch_size)
        if self.num_registers is not None and self.num_registers < spec.num_register_tokens:
            raise ValueError(
                f"Registers can be added, not removed: there are {spec.num_register_tokens}; got {self.num_registers}."
            )
        return grid


def resize_checkpoint(
    source: str,
    target: str,
    wanted: Target,
    *,
    to: str | None = None,
    layout: str = "auto",
    allow: Sequence[str] = (),
    hints: Hints | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Write ``source`` as ``wanted`` to ``target``, log each entry that changes, and see that the rest is the same.

    Args:
        to: layout of ``target``; None: that of ``source``.
        layout, allow, hints, overwrite: as in ``convert``.

    Returns:
        What was compared.

    Raises:
        FileNotFoundError, ValueError: if the source cannot be read or resized so, or a comparison fails. ``target`` is then
            as it was.
    """
    require_free(target, overwrite, source)
    content = read_content(source)
    chosen = detect_layout(content) if layout == "auto" else LAYOUTS[layout]
    old = chosen.read(content, hints or Hints())
    old.require_complete(source, allow)
    to = to or old.layout
    require_place(target, to, overwrite, source)
    logger.info("%s: layout %s, %s.", source, old.layout, old.spec.describe())
    new, results = resize_weights(old, wanted)
    _report(old, new, to)
    require_agreement(results, "The result does not compute what it should")
    chunks = _num_chunks(content) if to.startswith("meta") else 0
    results += save_weights(new, target, to, allow=allow, block_chunks=chunks, overwrite=overwrite, what=source)
    return results


def resize_weights(weights: Weights, wanted: Target) -> tuple[Weights, list[Comparison]]:
    """The resized weights, in the dtypes they had, and each step compared with the one before in float32.

    Raises:
        ValueError: if that cannot be, or there is nothing to change.
    """
    grid = wanted.grid(weights.spec)
    results: list[Comparison] = []
    new = weights
    for resized, compared in _steps(weights, wanted, grid):
        new = resized
        results += compared
    if new is weights:
        raise ValueError(f"Nothing to change: it is {weights.spec.describe()} already.")
    parts = {
        part: {name: _in_dtype_of(weights.parts[part].get(name), value) for name, value in entries.items()}
        for part, entries in new.parts.items()
    }
    return replace(new, parts=parts), results


def _steps(weights: Weights, wanted: Target, grid: tuple[int, int]) -> Iterator[tuple[Weights, list[Comparison]]]:
    """Each step's result, and its comparison with the model before."""
    spec = weights.spec
    if wanted.in_chans not in (None, spec.in_chans):
        before, weights = weights, with_channels(weights, wanted.in_chans)
        yield weights, _compare_channels(before, weights)
    if wanted.patch_size not in (None, spec.patch_size):
        before, weights = weights, with_patch_size(weights, wanted.patch_size)
        yield weights, _compare_patches(before, weights)
    if grid != spec.table_grid:
        before, weights = weights, with_table_grid(weights, grid)
        yield weights, _compare_positions(before, weights)
    if wanted.num_registers not in (None, spec.num_register_tokens):
        before, weights = weights, with_registers(weights, wanted.num_registers)
        yield weights, _compare_registers(before, weights)


def _in_dtype_of(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else new.to(old.dtype)


def _compare_channels(old: Weights, new: Weights) -> list[Comparison]:
    fewer = min(old.spec.in_chans, new.spec.in_chans)
    images = _images(old.spec, channels=fewer)
    what = f"channels {old.spec.in_chans} -> {new.spec.in_chans}: images of {fewer}, repeated cyclically in each"
    return _compare(
        what, old, new, repeat_channels(images, old.spec.in_chans), repeat_channels(images, new.spec.in_chans)
    )


def _compare_patches(old: Weights, new: Weights) -> list[Comparison]:
    before, after = old.spec.patch_size, new.spec.patch_size
    images = _images(old.spec)
    return _compare(
        f"patch {before} -> {after}: images with each patch resampled",
        old,
        new,
        images,
        resample_patches(images, before, after),
        must_agree=after > before,
        if_not="for information: a smaller patch holds less, and white noise shows it most",
    )


def _compare_positions(old: Weights, new: Weights) -> list[Comparison]:
    images = _images(new.spec)
    rows, columns = new.spec.img_size
    return _compare(
        f"{rows} x {columns} pixels: own positions, and the old ones interpolated", old, new, images, images
    )


def _compare_registers(old: Weights, new: Weights) -> list[Comparison]:
    images = _images(new.spec)
    what = f"registers {old.spec.num_register_tokens} -> {new.spec.num_register_tokens}: CLS and patch tokens"
    return _compare(what, old, new, images, images, must_agree=False, if_not="for information: train them in")


def _images(spec: BackboneSpec, channels: int | None = None) -> Tensor:
    shape = (2, spec.in_chans if channels is None else channels, *spec.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _compare(
    what: str, old: Weights, new: Weights, old_images: Tensor, new_images: Tensor, **verdict: Any
) -> list[Comparison]:
    """CLS and patch tokens of every backbone; registers have no counterpart where they are new."""
    results = []
    for part in filter(is_backbone, old.parts):
        tokens: list[Tensor] = []
        for weights, images in ((old, old_images), (new, new_images)):
            run = tokens_of_backbone(replace(weights, parts={"backbone": weights.parts[part]}))
            with torch.inference_mode():
                output = run(images)
            tokens.append(torch.cat((output[:, :1], output[:, 1 + weights.spec.num_register_tokens :]), dim=1))
        results.append(compare_tensors(f"{part}, {what}", tokens[0], tokens[1], **verdict))
    return results


def _report(old: Weights, new: Weights, to: str) -> None:
    """Log what differs between ``old`` and what a reader of layout ``to`` will find, and what is left out.

    Raises:
        CheckpointError: if the layout cannot hold it.
    """
    stored = LAYOUTS[to].write(new)[0]
    found = LAYOUTS[to].read(stored, Hints(new.spec.num_heads, new.spec.table_grid))
    num_same = 0
    for part, entries in found.parts.items():
        for name, value in entries.items():
            before = old.parts.get(part, {}).get(name)
            if before is not None and _same_bits(before, value):
                num_same += 1
                continue
            shape = "none" if before is None else list(before.shape)
            logger.info("changed: %s.%s %s -> %s", part, name, shape, list(value.shape))
    logger.info("All other %d entries are bitwise unchanged.", num_same)
    flags = [f"antialias {s.interpolate_antialias}, offset {s.interpolate_offset:g}" for s in (old.spec, found.spec)]
    if flags[0] != flags[1]:
        logger.info("changed: interpolation of positions at other sizes (a rule of the layout) %s -> %s", *flags)
    if old.config is not None and found.config is not None:
        for (key, before_value), (_, value) in zip(_options(old.config), _options(found.config), strict=True):
            if before_value != value:
                logger.info("changed: config %s %s -> %s", key, before_value, value)
    if old.left_out:
        logger.info("Left out, as it belongs to the training of the old model: %s.", ", ".join(old.left_out))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also the sign of zero and NaNs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.flatten().contiguous().view(torch.uint8) for t in (a, b)))


def _options(text: str) -> list[tuple[str, Any]]:
    return list(flatten(cfg_from_text(text)))


def _num_chunks(content: FileContent) -> int:
    """In how many chunks the file stores the blocks (Meta's layouts); 0: none."""
    names = content.data.get("teacher", content.data)
    return len({match[1] for name in names if (match := re.search(r"\bblocks\.(\d+)\.\d+\.", name))})
