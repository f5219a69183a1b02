"""From a backbone in any layout to an image classifier that trains, with its config beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoengine.checkpoint.checkpointer import Checkpointer
from dinoengine.checkpoint.classifier_config import classifier_config, config_file_text
from dinoengine.checkpoint.files import CheckpointError, StateDict, short_list
from dinoengine.checkpoint.heads import HeadShape, head_shape
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.layout import add_prefix
from dinoengine.checkpoint.linear_head import read_linear_head
from dinoengine.checkpoint.output import checked_output, require_agreement, require_free
from dinoengine.checkpoint.parity import Comparison
from dinoengine.checkpoint.weights import Weights
from dinoengine.config import CfgNode, cfg_from_text, read_cfg
from dinoengine.data import build_datasets, require_labels
from dinoengine.modeling import build_model

logger = logging.getLogger(__name__)


def convert_to_classifier(
    source: str,
    target: str,
    *,
    num_classes: int | None = None,
    last_blocks: int | None = None,
    mean_patch: bool | None = None,
    linear_head: str = "",
    mode: str = "linear",
    train: Sequence[str] = (),
    test: Sequence[str] = (),
    overrides: Sequence[Any] = (),
    layout: str = "auto",
    hints: Hints | None = None,
    allow: Sequence[str] = (),
    overwrite: bool = False,
) -> Comparison:
    """Write the (teacher's) backbone of ``source`` with a linear head to ``target``, and a config beside it.

    Args:
        target: ends in .pth; the config is the same path with .yaml.
        num_classes: None: as many as ``linear_head`` or ``train`` has. Where nothing says it, a source that is a
            classifier keeps its head.
        last_blocks, mean_patch: what a new head sees (see MODEL.CLASSIFIER; None: 1 and False). A head that is given
            says it by its width.
        linear_head: a head of Meta's; empty: a new one.
        mode: "linear" (the backbone stays frozen) or "finetune".
        train, test: dataset strings for the config.
        overrides: KEY VALUE words for the config.
        layout, hints, allow: how to read the source; see ``dinoengine.checkpoint.convert.convert``.

    Returns:
        Logits of the written classifier against the head on features of the source's backbone; they agree.

    Raises:
        FileNotFoundError, CheckpointError: if something cannot be read, does not fit, or would be overwritten.
        ValueError: for data that do not fit, or a config that cannot be run.
    """
    config_path = _config_path(target, overwrite, source)
    weights = read_weights(source, layout, hints)
    logger.info("%s: layout %s, %s.", source, weights.layout, weights.spec.describe())
    weights.require_complete(source, allow)
    train_classes = _num_classes_of(train)
    head, head_source = _given_head(weights, source, linear_head, keep_own=num_classes is None and not train)
    wanted = (num_classes if num_classes is not None else train_classes, last_blocks, mean_patch)
    shape = _shape(head, head_source, weights.spec.embed_dim, wanted)
    if train:
        require_labels(build_datasets(train), shape.num_classes, f"the training set {list(train)}")
    cfg, keys = classifier_config(
        weights.spec,
        shape,
        mode,
        weights_path=os.path.abspath(target),
        output_dir=os.path.abspath(target).removesuffix(".pth"),
        source_cfg=None if weights.config is None else cfg_from_text(weights.config),
        train=train,
        test=test,
        overrides=overrides,
    )
    model = _model_entries(cfg, weights, head)
    text = config_file_text(cfg, keys, mode, weights.spec, shape, source, config_path)
    used = {"backbone", "linear_head"} if head is not None and not linear_head else {"backbone"}
    if left_out := [part for part in weights.parts if part not in used]:
        logger.info("Left out, as a classifier has no use for it: %s.", ", ".join(left_out))
    logger.info("Head: %s; %s.", shape.describe(), f"from {head_source}" if head else "new, untrained")
    result = _write_and_check({"model": model, "config": cfg.dump()}, text, target, config_path, cfg, weights)
    logger.info("Wrote %s and %s; train it with: tools/train_net.py --config-file %s", target, config_path, config_path)
    return result


def _config_path(target: str, overwrite: bool, source: str) -> str:
    if not target.endswith(".pth"):
        raise CheckpointError(f"OUT must end in .pth (its config gets the same name with .yaml), got {target}.")
    config_path = target.removesuffix(".pth") + ".yaml"
    for path in (target, config_path):
        require_free(path, overwrite, source)
    return config_path


def _num_classes_of(train: Sequence[str]) -> int | None:
    names = build_datasets(train).class_names if train else None
    return None if names is None else len(names)


def _given_head(weights: Weights, source: str, path: str, *, keep_own: bool) -> tuple[StateDict | None, str]:
    """(head, where it is from); None for a new one."""
    if path:
        return read_linear_head(path), path
    if keep_own and "linear_head" in weights.parts:
        return weights.parts["linear_head"], source
    return None, ""


def _shape(
    head: StateDict | None, path: str, embed_dim: int, wanted: tuple[int | None, int | None, bool | None]
) -> HeadShape:
    """What the head sees, from the head or from what is wanted of a new one.

    Raises:
        CheckpointError: if they contradict each other, or nothing says how many classes there are.
    """
    if head is None:
        num_classes, last_blocks, mean_patch = wanted
        if num_classes is None:
            raise CheckpointError(
                "How many classes? Give --num-classes, --train with a labelled dataset, or --linear-head."
            )
        return HeadShape(num_classes, last_blocks or 1, bool(mean_patch))
    shape = head_shape(head, embed_dim, path)
    classes, blocks, mean = (given if want is None else want for given, want in zip(shape, wanted, strict=True))
    asked = HeadShape(classes, blocks, bool(mean))
    if asked != shape:
        raise CheckpointError(
            f"The head of {path} gives {shape.describe()}, which is not what was asked for: {asked.describe()}."
        )
    return shape


def _model_entries(cfg: CfgNode, weights: Weights, head: StateDict | None) -> StateDict:
    """The classifier's state dict: a new head as SEED initialises it; a mask token the layout does not have stays 0.

    Raises:
        CheckpointError: if the weights do not fit the model of the config, which overrides may have changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(0, cfg.SEED))
        entries: StateDict = build_model(cfg).state_dict()
    given = add_prefix(weights.backbone, "backbone.") | add_prefix(head or {}, "head.")
    misfits = [name for name, value in given.items() if name not in entries or entries[name].shape != value.shape]
    kept = {name for name in entries if name not in given} - {
        f"backbone.{name}" for name in (*weights.absent, *weights.missing)
    }
    kept -= set() if head else {"head.weight", "head.bias"}
    if misfits or kept:
        raise CheckpointError(
            f"The overrides of MODEL make another model than that of the weights: {short_list([*misfits, *sorted(kept)])}."
        )
    return {name: given.get(name, value).to(value.dtype) for name, value in entries.items()}


def _write_and_check(
    content: dict[str, Any], text: str, target: str, config_path: str, cfg: CfgNode, weights: Weights
) -> Comparison:
    """Write both files, check them, and only then let them take their places."""
    with checked_output(config_path) as config:  # which names the weights and therefore comes last
        written = os.path.join(os.path.dirname(config), os.path.basename(target))
        torch.save(content, written)
        with open(config, "w", encoding="utf-8") as file:
            file.write(text)
        result = _compare(written, config, cfg, weights)
        require_agreement([result], "The classifier does not compute what its parts do")
    return result


def _compare(path: str, config_path: str, cfg: CfgNode, weights: Weights) -> Comparison:
    """The classifier as a run would build and load it, against the head on the features of the source's backbone."""
    run_cfg = read_cfg(config_path)
    assert run_cfg == cfg, "the config file does not say all that the config has"
    model = build_model(run_cfg)
    Checkpointer(model, "").load_weights(path)
    crop = run_cfg.INPUT.GLOBAL_CROPS.SIZE_PX
    generator = torch.Generator().manual_seed(0)
    size = (4, weights.spec.in_chans, crop[0], crop[-1])
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    with torch.inference_mode():
        got = model.eval().feature_model()(images).logits  # type: ignore[operator]
        expected = _logits_by_parts(images, run_cfg, weights, torch.load(path, weights_only=True)["model"])
    what = f"logits of the classifier and of the source's backbone with the head, at {crop[0]} x {crop[-1]} pixels"
    difference = (expected - got).abs().max().item()
    return Comparison(what, difference, expected.abs().max().item())


def _logits_by_parts(images: Tensor, cfg: CfgNode, weights: Weights, entries: StateDict) -> Tensor:
    """Without the classifier's code: pixels, tokens of the source's backbone block by block, one matrix product."""
    backbone = weights.load_backbone()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    outputs = backbone.get_intermediate_layers((images / 255.0 - mean) / std, range(backbone.num_layers))
    columns = [output.cls_token for output in outputs[-cfg.MODEL.CLASSIFIER.NUM_LAST_BLOCKS :]]
    if cfg.MODEL.CLASSIFIER.MEAN_PATCH:
        columns.append(outputs[-1].patch_tokens.mean(dim=1))
    return F.linear(torch.cat(columns, dim=1), entries["head.weight"], entries["head.bias"])
