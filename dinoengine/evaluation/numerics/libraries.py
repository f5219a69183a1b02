"""The backbone beside those of timm and transformers, where they are installed: random weights, no download.

``pip install -e '.[interop]'`` installs both.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinoengine.evaluation.numerics.quantity import Quantity
from dinoengine.modeling import VisionTransformer

TOLERANCE = 1e-4
NATIVE_PX = 70  # a table of 5 x 5
SIZES = ((70, 70), (98, 98), (42, 70))
WIDTH, DEPTH, HEADS = 48, 2, 4
# Model -> registers. timm resamples the position table with antialiasing, transformers only with registers; neither has
# the offset.
TIMM_MODELS = {"vit_small_patch14_dinov2": 0, "vit_small_patch14_reg4_dinov2": 4}
TRANSFORMERS_MODELS = {"Dinov2": 0, "Dinov2WithRegisters": 4}


def check_timm() -> Iterator[Quantity]:
    """timm's models at reduced width and depth."""
    for name, registers in TIMM_MODELS.items():
        label = f"tokens, timm {name}, largest difference"
        if importlib.util.find_spec("timm") is None:
            yield Quantity(label, "timm", 0.0, None, TOLERANCE, "timm is not installed", skipped=True)
            continue
        import timm

        theirs: Any = timm.create_model(
            name, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, img_size=NATIVE_PX, dynamic_img_size=True
        )
        _randomise(theirs)
        ours = _ours(registers, antialias=True)
        _load(ours, _from_timm(theirs.state_dict()))
        yield _compare(label, f"timm {timm.__version__}", ours, theirs.eval().forward_features)


def check_transformers() -> Iterator[Quantity]:
    """Dinov2Model and Dinov2WithRegistersModel of Hugging Face, through the files they save."""
    needed = [name for name in ("transformers", "safetensors") if importlib.util.find_spec(name) is None]
    for name, registers in TRANSFORMERS_MODELS.items():
        label = f"tokens, transformers {name}, largest difference"
        if needed:
            note = f"{' and '.join(needed)} not installed"
            yield Quantity(label, "transformers", 0.0, None, TOLERANCE, note, skipped=True)
            continue
        import transformers
        from safetensors.torch import load_file

        transformers.utils.logging.disable_progress_bar()
        theirs = _build_transformers(name, registers)
        _randomise(theirs)
        ours = _ours(registers, antialias=bool(registers))
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            _load(ours, _from_transformers(load_file(Path(folder) / "model.safetensors")))
        source = f"transformers {transformers.__version__}"
        yield _compare(label, source, ours, partial(_last_hidden_state, theirs.eval()))


def _last_hidden_state(model: Any, images: Tensor) -> Tensor:
    tokens: Tensor = model(images).last_hidden_state
    return tokens


def _build_transformers(name: str, registers: int) -> Any:
    import transformers

    options: dict[str, Any] = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=NATIVE_PX,
        patch_size=14,
        **options,
    )
    return getattr(transformers, f"{name}Model")(config)


@torch.no_grad()
def _compare(label: str, source: str, ours: VisionTransformer, theirs: Callable[[Tensor], Tensor]) -> Quantity:
    """Over CLS, registers and patches (in this order in both), at the table's and at other sizes."""
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for size in SIZES:
        images = torch.randn(2, 3, *size, generator=generator)
        output = ours(images)
        tokens = torch.cat((output.cls_token[:, None], output.register_tokens, output.patch_tokens), dim=1)
        largest = max(largest, (tokens - theirs(images)).abs().max().item())
    return Quantity(label, source, 0.0, largest, TOLERANCE)


def _ours(registers: int, *, antialias: bool) -> VisionTransformer:
    return VisionTransformer(
        img_size=(NATIVE_PX, NATIVE_PX),
        patch_size=14,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_register_tokens=registers,
        interpolate_antialias=antialias,
        interpolate_offset=0.0,
    ).eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """No parameter keeps a value (0, 1, 1e-5) behind which a wrong place could hide."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name and name.endswith("weight")))


def _load(ours: VisionTransformer, state: dict[str, Tensor]) -> None:
    # timm has no mask token; nothing else may be missing or left over.
    ours.load_state_dict({"mask_token": ours.mask_token, **state})


def _from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in state.items()}
    if "reg_token" in state:  # its table then has no row for CLS: a position of 0
        table = state["pos_embed"]
        renamed["pos_embed"] = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
    return renamed


_TRANSFORMERS_NAMES = (
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if ".query." in name:
            tensor = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.attention.query", "attn.qkv")
        elif ".key." in name or ".value." in name:
            continue
        for theirs, ours in _TRANSFORMERS_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed
