"""From one layout to another, with every entry accounted for and the result run before it is kept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from dinoengine.checkpoint.files import CheckpointError, FileContent, StateDict, grouped_names, short_list
from dinoengine.checkpoint.layouts import LAYOUTS, Hints, read_weights
from dinoengine.checkpoint.layouts.meta import with_chunks
from dinoengine.checkpoint.output import checked_output, require_agreement, require_free
from dinoengine.checkpoint.parity import Comparison, compare_files
from dinoengine.checkpoint.weights import PUBLISHED_HEAD_WIDTH, BackboneSpec, Weights, is_backbone, not_allowed

logger = logging.getLogger(__name__)


def convert(
    source: str,
    target: str,
    to: str,
    *,
    layout: str = "auto",
    allow: Sequence[str] = (),
    hints: Hints | None = None,
    block_chunks: int = 0,
    overwrite: bool = False,
) -> list[Comparison]:
    """Read ``source``, write ``target`` in layout ``to``, and see that both compute the same.

    Args:
        layout: of the source; "auto" goes by its keys.
        allow: patterns of entries that may be missing from the source or have no place in the target.
        hints: what the source does not say.
        block_chunks: chunks of blocks to write (Meta's layouts only); 0: none.
        overwrite: replace ``target`` if it exists.

    Returns:
        What was compared, all of it in agreement.

    Raises:
        FileNotFoundError, CheckpointError: if the source cannot be read, an entry is not accounted for, or the result
            does not compute the same. ``target`` is then as it was.
    """
    require_place(target, to, overwrite, source)
    hints = hints or Hints()
    weights = read_weights(source, layout, hints)
    logger.info("%s: layout %s, %s.", source, weights.layout, weights.spec.describe())
    weights.require_complete(source, allow)
    if weights.left_out:
        logger.info("Left out, as it belongs to the training: %s.", ", ".join(weights.left_out))
    return save_weights(
        weights, target, to, allow=allow, hints=hints, block_chunks=block_chunks, overwrite=overwrite, what=source
    )


def save_weights(
    weights: Weights,
    target: str,
    to: str,
    *,
    allow: Sequence[str] = (),
    hints: Hints | None = None,
    block_chunks: int = 0,
    overwrite: bool = False,
    what: str = "The source",
) -> list[Comparison]:
    """Write ``weights`` in layout ``to``; see ``convert``. ``what`` they are is for messages."""
    require_place(target, to, overwrite)
    if block_chunks and (not to.startswith("meta") or not 1 <= block_chunks <= weights.spec.depth):
        raise CheckpointError(
            f"{block_chunks} block chunks: Meta's layouts alone have them, from 1 to the {weights.spec.depth} blocks."
        )
    destination = LAYOUTS[to]
    content, lost = destination.write(_filled(weights, destination.never_stores))
    left_out = [name for name in lost if name in destination.never_stores]
    if unplaced := not_allowed([name for name in lost if name not in left_out], allow):
        raise CheckpointError(
            f"{what} has {len(unplaced)} entries that the {to} layout has no place for: "
            f"{short_list(grouped_names(unplaced))}.\nLeave them out by name, e.g. --allow '{_prefix(unplaced[0])}*'."
        )
    if lost:
        logger.info("Left out, as the %s layout has no place for it: %s.", to, short_list(grouped_names(lost)))
    if block_chunks:
        content = _chunked(content, weights.spec.depth, block_chunks)
    hints = replace(hints or Hints(), num_heads=weights.spec.num_heads)
    if weights.spec.table_grid[0] != weights.spec.table_grid[1]:
        hints = replace(hints, table_grid=weights.spec.table_grid)
    stored = {part: entries for part, entries in weights.parts.items() if not _is_lost(part, entries, lost)}
    with checked_output(target) as written:
        write_content(content, written)
        results = compare_files(replace(weights, parts=stored), written, to, hints)
        require_agreement(results, "The result does not compute what the source does")
    logger.info("Wrote %s (layout %s).", target, to)
    _say_what_is_not_stated(weights.spec, target, to)
    return results


def require_place(target: str, to: str, overwrite: bool, source: str = "") -> None:
    """CheckpointError if a file or folder of layout ``to`` cannot be ``target``."""
    if LAYOUTS[to].is_nested and target.endswith(".safetensors"):
        raise CheckpointError(
            f"The {to} layout is nested, which safetensors cannot hold; choose a name that ends in .pth, not {target}."
        )
    if LAYOUTS[to].is_folder and os.path.isfile(target):
        raise CheckpointError(f"{target} is a file, and the {to} layout is a folder; choose another name.")
    require_free(target, overwrite, source)


def _is_lost(part: str, entries: StateDict, lost: Sequence[str]) -> bool:
    return all(f"{part}.{name}" in lost for name in entries)


def _say_what_is_not_stated(spec: BackboneSpec, target: str, to: str) -> None:
    """Warn if a reader of the file alone would take it for another model: no entry shows heads or a rectangle."""
    if LAYOUTS[to].states_shape:
        return
    flags, keys = [], []
    if spec.embed_dim != PUBLISHED_HEAD_WIDTH * spec.num_heads:
        flags.append(f"--num-heads {spec.num_heads}")
        keys.append(f"MODEL.VIT.NUM_HEADS {spec.num_heads}")
    if spec.table_grid[0] != spec.table_grid[1]:
        flags.append(f"--grid {spec.table_grid[0]} {spec.table_grid[1]}")
        keys.append(f"MODEL.VIT.POS_EMBED_SIZE_PX '({spec.img_size[0]},{spec.img_size[1]})'")
    if flags:
        logger.warning(
            "The %s layout cannot state this: wherever %s is read, give %s (in training %s), or it is another model.",
            to,
            target,
            " ".join(flags),
            " ".join(keys),
        )


def _prefix(name: str) -> str:
    return name.rpartition(".")[0].split(".")[0] + "." if "." in name else name


def _filled(weights: Weights, never_stored: Sequence[str]) -> Weights:
    """Zeros for what the source's layout never stores and the target's does (the mask token)."""
    needed = [name for name in weights.absent if name not in never_stored]
    if not needed:
        return weights
    shapes = weights.spec.build("meta").state_dict()
    logger.info("The %s layout has no %s; it is written as zeros.", weights.layout, ", ".join(needed))
    zeros = {name: torch.zeros(shapes[name].shape) for name in needed}
    parts = {part: {**zeros, **e} if is_backbone(part) else e for part, e in weights.parts.items()}
    return replace(weights, parts=parts)


def _chunked(content: FileContent, depth: int, num_chunks: int) -> FileContent:
    data = content.data
    if "teacher" in data:
        backbone = {n.removeprefix("backbone."): v for n, v in data["teacher"].items() if n.startswith("backbone.")}
        others = {n: v for n, v in data["teacher"].items() if not n.startswith("backbone.")}
        chunked = {f"backbone.{n}": v for n, v in with_chunks(backbone, depth, num_chunks).items()}
        return replace(content, data={"teacher": {**chunked, **others}})
    return replace(content, data=with_chunks(data, depth, num_chunks))


def write_content(content: FileContent, path: str) -> None:
    """One ``.pth`` or ``.safetensors`` file; a folder where there is a config."""
    from safetensors.torch import save_file

    if content.config is not None:
        os.makedirs(path)
        with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
            json.dump(content.config, file, indent=2, allow_nan=False)
            file.write("\n")
        save_file(content.data, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    elif path.endswith(".safetensors"):
        save_file(content.data, path, metadata={"format": "pt"})
    else:
        torch.save(content.data, path)
