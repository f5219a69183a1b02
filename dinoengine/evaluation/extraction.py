"""Extracting the features of a dataset into a ``FeatureStore``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinoengine.config import CfgNode
from dinoengine.data import build_test_loader
from dinoengine.evaluation.feature_store import FeatureStore, StoreWriter, require_pyarrow
from dinoengine.evaluation.finite import FiniteCheck
from dinoengine.evaluation.records import preprocessing, weights_sha256
from dinoengine.modeling import FeatureModel
from dinoengine.structures import BackboneOutput, ImageBatch
from dinoengine.utils import comm
from dinoengine.utils.logger import log_every_n_seconds

logger = logging.getLogger(__name__)

TOKENS = ("cls", "mean_patch", "patch", "register")
DTYPES = ("float32", "float16")
# An interrupted run loses what it did since the last time.
_SECONDS_BETWEEN_FLUSHES = 10.0


@dataclass(frozen=True)
class Extraction:
    """What to take from the model.

    Attributes:
        tokens: any of TOKENS.
        num_last_blocks: blocks whose tokens (after the final norm) stand side by side, oldest first.
        normalize: give each row (each token, for patch and register) length 1, all blocks together.
        dtype: of the arrays; the model computes in its own.
    """

    tokens: tuple[str, ...] = ("cls",)
    num_last_blocks: int = 1
    normalize: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: for unknown or repeated tokens, or another dtype.
        """
        if not self.tokens or set(self.tokens) - set(TOKENS) or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(
                f"Tokens are some of {', '.join(TOKENS)}, each once; got {', '.join(self.tokens) or 'none'}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"The dtype of features is one of {', '.join(DTYPES)}; got {self.dtype!r}.")

    def rows(self, outputs: Sequence[BackboneOutput]) -> dict[str, Tensor]:
        """Tokens of the last blocks -> token -> [B, n * D] or [B, tokens, n * D], float32."""
        parts = {
            "cls": [output.cls_token for output in outputs],
            "mean_patch": [output.patch_tokens.mean(1) for output in outputs],
            "patch": [output.patch_tokens for output in outputs],
            "register": [output.register_tokens for output in outputs],
        }
        rows = {name: torch.cat(parts[name], dim=-1).float() for name in self.tokens}
        return {name: F.normalize(row, dim=-1) for name, row in rows.items()} if self.normalize else rows


def extract_to_store(
    model: FeatureModel,
    cfg: CfgNode,
    dataset: str,
    path: str,
    extraction: Extraction,
    *,
    weights_file: str = "",
    overwrite: bool = False,
    parquet: bool = False,
    show_progress: bool = False,
) -> FeatureStore:
    """Features of every image of a dataset, exactly one row each, whatever the number of processes.

    A run that was interrupted continues where it was, also with other processes and batches.

    Args:
        model: in eval mode, on the device to use.
        cfg: INPUT.TEST, INPUT.FORMAT, TEST.IMS_PER_BATCH (over all processes), DATALOADER.
        dataset: a dataset string.
        path: of the store.
        weights_file: where the weights came from, for meta.json.
        parquet: the index as a parquet file as well (needs pyarrow).
        show_progress: a bar on the first process, if standard error is a terminal.

    Raises:
        ValueError: if ``path`` holds something else, the crop does not fit the patches, or a feature is not finite (names
            the images).
    """
    if parquet:
        require_pyarrow()
    whole = build_test_loader(cfg, dataset).dataset.dataset  # type: ignore[attr-defined]
    settings = {
        "dataset": dataset,
        "num_images": len(whole),
        "weights_sha256": weights_sha256(model),
        "preprocessing": preprocessing(cfg),
        "extraction": {**asdict(extraction), "tokens": list(extraction.tokens)},
    }
    shapes = _row_shapes(model, cfg, extraction)
    arrays = {name: (shape, extraction.dtype) for name, shape in shapes.items()}
    writer = StoreWriter(path, whole, settings, arrays, overwrite=overwrite)
    if writer.is_finished:
        logger.info("%s is complete already, with these settings.", path)
        if parquet:
            writer.add_parquet()
        return FeatureStore(path)
    try:
        images = writer.missing()
        if 0 < len(images) < len(whole):
            logger.info("Continuing: %d of %d images are done.", len(whole) - len(images), len(whole))
        loader = build_test_loader(cfg, dataset, images=images)
        _fill(writer, model, loader, extraction, show_progress)
        writer.finish(parquet, weights_file=weights_file)
    except BaseException:  # an interrupt above all
        logger.warning(
            "Not complete: %s keeps the rows done so far. The same command goes on from there, also with other processes "
            "and batches; remove that folder if you do not want it.",
            writer.folder,
        )
        raise
    finally:
        writer.close()
    logger.info("Features of %d images in %s: %s.", len(whole), path, _describe(shapes))
    return FeatureStore(path)


def _fill(writer: StoreWriter, model: FeatureModel, loader: Any, extraction: Extraction, show_progress: bool) -> None:
    from tqdm import tqdm

    num_images, flushed = len(loader.sampler), time.monotonic()
    is_shown = show_progress and comm.is_main_process()
    # disable=None: no bar where standard error is no terminal; the log says how far it is.
    bar = tqdm(total=num_images, unit="image", desc="features", disable=None if is_shown else True)
    done = 0
    try:
        with bar, torch.inference_mode():
            for batch in loader:
                _write_batch(writer, model, batch, extraction)
                done += len(batch)
                bar.update(len(batch))
                if bar.disable:
                    message = f"{done} of {num_images} images of this process"
                    log_every_n_seconds(logging.INFO, message, 10, name=__name__, key="progress")
                if time.monotonic() - flushed > _SECONDS_BETWEEN_FLUSHES:
                    writer.flush()
                    flushed = time.monotonic()
    finally:
        writer.flush()  # what was done stays done, whatever stops the run


def _write_batch(writer: StoreWriter, model: FeatureModel, batch: ImageBatch, extraction: Extraction) -> None:
    device = next(model.parameters()).device
    outputs = model.forward_last_blocks(batch.images.to(device), extraction.num_last_blocks)
    exact = {name: row.cpu() for name, row in extraction.rows(outputs).items()}
    rows = {name: row.to(getattr(torch, extraction.dtype)) for name, row in exact.items()}
    too_large = f"They are too large for {extraction.dtype}; take float32, or normalize them."
    for values, check in (
        (exact, FiniteCheck(writer.dataset)),
        (rows, FiniteCheck(writer.dataset, f"{extraction.dtype} features", too_large)),
    ):
        check.see(torch.cat([row.flatten(1) for row in values.values()], dim=1), batch.indices)
        check.finish_here()
    writer.write(batch.indices.numpy(), {name: row.numpy() for name, row in rows.items()})


def _row_shapes(model: FeatureModel, cfg: CfgNode, extraction: Extraction) -> dict[str, tuple[int, ...]]:
    """Of a blank image: what the model makes of the crop."""
    crop, patch = cfg.INPUT.TEST.CROP_SIZE_PX, model.backbone.patch_size
    size = (crop[0], crop[-1])
    if any(edge % patch for edge in size):
        raise ValueError(f"The crop of {size[0]} x {size[1]} pixels is no multiple of the patch of {patch} pixels.")
    device = next(model.parameters()).device
    blank = torch.zeros(1, len(cfg.MODEL.PIXEL_MEAN), *size, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        rows = extraction.rows(model.forward_last_blocks(blank, extraction.num_last_blocks))
    if "register" in rows and rows["register"].shape[1] == 0:
        raise ValueError("This backbone has no register tokens; leave 'register' out.")
    return {name: tuple(row.shape[1:]) for name, row in rows.items()}


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {np.array(shape).tolist()}" for name, shape in shapes.items())
