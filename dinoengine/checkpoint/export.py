"""The backbone at one image size for other runtimes: ONNX, and torch.export's own file."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinoengine.checkpoint.files import CheckpointError
from dinoengine.checkpoint.layouts import Hints, read_weights
from dinoengine.checkpoint.layouts.own import config_of
from dinoengine.checkpoint.output import checked_output, require_agreement, require_free
from dinoengine.checkpoint.parity import Comparison, compare_tensors
from dinoengine.checkpoint.resize_steps import with_table_grid
from dinoengine.checkpoint.weights import BackboneSpec, Weights, grid_of
from dinoengine.modeling.backbone.vit import VisionTransformer

logger = logging.getLogger(__name__)

# One protobuf message holds 2 GiB; weights beyond that go to a second file, OUT.data.
_MAX_BYTES_IN_ONNX = 1_900_000_000
# The graph is traced with the first number of images and must hold for the others.
_BATCH_SIZES = (2, 1, 3)
_METADATA_FILE = "dinoengine.json"

Outputs = dict[str, Tensor]
Run = Callable[[Tensor], Outputs]


class FixedSizeBackbone(nn.Module):
    """Normalised images [B, C, H, W] -> cls_token [B, D], register_tokens [B, R, D] if any, patch_tokens [B, N, D]."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Outputs:
        output = self.backbone(images)
        tokens = {"cls_token": output.cls_token}
        if self.backbone.num_register_tokens:
            tokens["register_tokens"] = output.register_tokens
        return {**tokens, "patch_tokens": output.patch_tokens}


class Exporter(NamedTuple):
    """One kind of file.

    Attributes:
        packages: what it needs beside torch.
        write: (model, images to trace with, path, metadata) -> the file.
        load: path -> what runs the file.
        beside: endings of the files that ``write`` may put beside it.
    """

    packages: tuple[str, ...]
    write: Callable[[FixedSizeBackbone, Tensor, str, dict[str, str]], None]
    load: Callable[[str], Run]
    beside: tuple[str, ...] = ()


def export_backbone(
    source: str,
    target: str,
    to: str,
    *,
    img_size: tuple[int, int] | None = None,
    layout: str = "auto",
    allow: Sequence[str] = (),
    hints: Hints | None = None,
    overwrite: bool = False,
) -> list[Comparison]:
    """Write the (teacher's) backbone for images of one size, any number at a time, and run the file against the model.

    The position table is interpolated once, here, so that the graph holds none of it.

    Args:
        to: a name in EXPORTERS.
        img_size: (rows, columns) in pixels; None: that of the position table.
        layout, allow, hints, overwrite: as in ``convert``.

    Returns:
        What was compared, all of it in agreement.

    Raises:
        FileNotFoundError, ValueError: if the source cannot be read, the size is no multiple of the patch, a package is
            missing, or the file does not compute the same. ``target`` is then as it was.
    """
    exporter = EXPORTERS[to]
    beside = [target + ending for ending in exporter.beside]
    for path in (target, *beside):
        require_free(path, overwrite, source)
    if missing := [name for name in exporter.packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--to {to} needs {', '.join(missing)}: pip install 'dinoengine[onnx]'.")
    weights = read_weights(source, layout, hints)
    logger.info("%s: layout %s, %s.", source, weights.layout, weights.spec.describe())
    weights.require_complete(source, allow)
    size = img_size or weights.spec.img_size
    grid = grid_of(size, weights.spec.patch_size)
    baked = FixedSizeBackbone(with_table_grid(weights, grid).load_backbone()).eval()
    reference = FixedSizeBackbone(weights.load_backbone())  # interpolates for itself
    with checked_output(target, beside) as written:
        example = _images(weights.spec, size, _BATCH_SIZES[0])
        with torch.no_grad():
            exporter.write(baked, example, written, _metadata(weights, size))
        results = _compare(reference, exporter.load(written), weights.spec, size)
        require_agreement(results, "The file does not compute what the model does")
    logger.info(
        "Wrote %s: normalised float32 images [B, %d, %d, %d] -> %s.",
        target,
        weights.spec.in_chans,
        *size,
        ", ".join(baked(example[:1])),
    )
    return results


def _metadata(weights: Weights, size: tuple[int, int]) -> dict[str, str]:
    """What a user of the file needs to know, as JSON values."""
    spec = weights.spec
    shape = f"images [B, {spec.in_chans}, {size[0]}, {size[1]}], float32"
    facts: dict[str, object] = {
        "input": f"{shape}, (pixels / 255 - mean) / std per channel",
        "architecture": spec.describe(),
        "patch_size": spec.patch_size,
        "num_register_tokens": spec.num_register_tokens,
    }
    if weights.config is not None:
        cfg = config_of(spec, weights.config)
        facts |= {
            "format": cfg.INPUT.FORMAT,
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
        }
        if cfg.INPUT.VALUE_RANGE:
            low, high = cfg.INPUT.VALUE_RANGE
            facts["value_range"] = [low, high]
            facts["input"] = f"{shape}, ((values - {low}) / ({high} - {low}), cut to 0..1, - mean) / std per channel"
    return {
        name: value if isinstance(value, str) else json.dumps(value, allow_nan=False) for name, value in facts.items()
    }


def _images(spec: BackboneSpec, size: tuple[int, int], num: int) -> Tensor:
    return torch.randn(num, spec.in_chans, *size, generator=torch.Generator().manual_seed(num))


def _compare(reference: FixedSizeBackbone, run: Run, spec: BackboneSpec, size: tuple[int, int]) -> list[Comparison]:
    results = []
    for num in _BATCH_SIZES[1:]:
        images = _images(spec, size, num)
        with torch.inference_mode():
            expected = reference(images)
        got = run(images)
        if list(got) != list(expected):
            raise CheckpointError(f"The file gives {', '.join(got)}; expected {', '.join(expected)}.")
        results += [compare_tensors(f"{n}, {num} image(s)", value, got[n]) for n, value in expected.items()]
    return results


def _write_onnx(model: FixedSizeBackbone, images: Tensor, path: str, metadata: dict[str, str]) -> None:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=list(model(images)),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    assert program is not None, "torch.onnx.export(dynamo=True) returns a program"
    program.model.metadata_props.update(metadata)
    num_bytes = sum(value.nbytes for value in model.state_dict().values())
    program.save(path, external_data=num_bytes > _MAX_BYTES_IN_ONNX)


def _load_onnx(path: str) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Outputs:
        values = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def _write_torch_export(model: FixedSizeBackbone, images: Tensor, path: str, metadata: dict[str, str]) -> None:
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    with open(path, "wb") as file:  # given a path, it insists on the ending .pt2
        torch.export.save(program, file, extra_files={_METADATA_FILE: json.dumps(metadata, allow_nan=False)})


def _load_torch_export(path: str) -> Run:
    with open(path, "rb") as file:
        module: Run = torch.export.load(file).module()
    return module


EXPORTERS = {
    "onnx": Exporter(("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx, (".data",)),
    "torch-export": Exporter((), _write_torch_export, _load_torch_export),
}
