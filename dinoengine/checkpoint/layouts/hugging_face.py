"""Hugging Face transformers: ``Dinov2Model`` and ``Dinov2WithRegistersModel`` (config.json, model.safetensors)."""

from __future__ import annotations

from typing import Any

from dinoengine.checkpoint.files import CheckpointError, FileContent
from dinoengine.checkpoint.infer import make_weights
from dinoengine.checkpoint.layouts.layout import Hints, Layout, Rule, rename_to_ours, rename_to_theirs, strip_prefix
from dinoengine.checkpoint.weights import BackboneSpec, Weights
from dinoengine.modeling.layers.block import LAYER_NORM_EPS

_LAYER = "encoder.layer.{i}."
RULES = (
    Rule("cls_token", "embeddings.cls_token"),
    Rule("mask_token", "embeddings.mask_token"),
    Rule("register_tokens", "embeddings.register_tokens"),
    Rule("pos_embed", "embeddings.position_embeddings"),
    Rule("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    Rule("blocks.{i}.norm1", _LAYER + "norm1"),
    Rule("blocks.{i}.attn.qkv", tuple(f"{_LAYER}attention.attention.{name}" for name in ("query", "key", "value"))),
    Rule("blocks.{i}.attn.proj", _LAYER + "attention.output.dense"),
    Rule("blocks.{i}.ls1.gamma", _LAYER + "layer_scale1.lambda1"),
    Rule("blocks.{i}.norm2", _LAYER + "norm2"),
    Rule("blocks.{i}.mlp.fc1", _LAYER + "mlp.fc1"),
    Rule("blocks.{i}.mlp.fc2", _LAYER + "mlp.fc2"),
    Rule("blocks.{i}.mlp.w12", _LAYER + "mlp.weights_in"),
    Rule("blocks.{i}.mlp.w3", _LAYER + "mlp.weights_out"),
    Rule("blocks.{i}.ls2.gamma", _LAYER + "layer_scale2.lambda1"),
    Rule("norm", "layernorm"),
)


class HuggingFace(Layout):
    """Positions: interpolated to the size itself, with antialiasing only in the model with registers."""

    name = "huggingface"
    description = "Hugging Face Dinov2 or Dinov2WithRegisters folder (config.json + model.safetensors)"
    is_folder = True
    states_shape = True

    def detect(self, content: FileContent) -> bool:
        return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in content.data)

    def read(self, content: FileContent, hints: Hints) -> Weights:
        # A model with a head of its own (Dinov2ForImageClassification) holds the backbone under "dinov2.".
        prefix = next(
            (p for p in ("dinov2.", "dinov2_with_registers.") if f"{p}embeddings.cls_token" in content.data), ""
        )
        entries = strip_prefix(content.data, prefix)
        backbone, unknown = rename_to_ours(entries, RULES, content.path)
        parts = {"backbone": backbone}
        if head := strip_prefix(content.data, "classifier."):
            parts["linear_head"] = head
        unused = [prefix + name for name in unknown if not name.startswith("classifier.")]
        if prefix:
            unused += [n for n in content.data if not n.startswith((prefix, "classifier."))]
        config = content.config or {}
        num_heads = config.get("num_attention_heads")
        num_heads = hints.num_heads if num_heads is None else num_heads
        if backbone and num_heads is None:
            problem = (
                "has no config.json beside it, which states the attention heads; copy it there, or"
                if content.config is None
                else "has a config.json that does not state its attention heads (num_attention_heads);"
            )
            raise CheckpointError(f"{content.path} {problem} give --num-heads N (in Python Hints(num_heads=N)).")
        self._check(config, content.path)
        has_registers = "register_tokens" in backbone
        return make_weights(
            self.name,
            content.path,
            parts,
            antialias=has_registers,
            offset=0.0,
            num_heads=num_heads,
            table_grid=_grid(config, content.path) or hints.table_grid,
            optional=("mask_token",) if config.get("use_mask_token") is False else (),
            unused=unused,
            states_shape=content.config is not None,
        )

    def _check(self, config: dict[str, Any], path: str) -> None:
        """Refuse what the shapes do not show and this model cannot compute."""
        expected = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise CheckpointError(f"{path}: config.json has {key} {config[key]!r}; only {value!r} is supported.")

    def write(self, weights: Weights) -> tuple[FileContent, list[str]]:
        entries, lost = rename_to_theirs(weights.backbone, RULES)
        lost += [f"{part}.{name}" for part in weights.parts if part != "backbone" for name in weights.parts[part]]
        return FileContent("", entries, _config(weights.spec)), lost


def _grid(config: dict[str, Any], path: str) -> tuple[int, int] | None:
    """(rows, columns) of the position table as config.json states it."""
    if "image_size" not in config or "patch_size" not in config:
        return None
    (height, width), (patch_height, patch_width) = (
        _numbers(key, config[key], path) for key in ("image_size", "patch_size")
    )
    return height // patch_height, width // patch_width


def _numbers(key: str, value: object, path: str) -> tuple[int, int]:
    numbers: list[Any] = value if isinstance(value, list) else [value, value]
    if len(numbers) != 2 or not all(type(number) is int and number > 0 for number in numbers):
        raise CheckpointError(
            f"{path}: config.json has {key} {value!r}; expected a whole number of pixels, or two (height, width)."
        )
    return numbers[0], numbers[1]


def _config(spec: BackboneSpec) -> dict[str, Any]:
    """The config.json of the model.

    Raises:
        CheckpointError: if transformers' model cannot be like this one.
    """
    is_default_hidden = spec.ffn_hidden % spec.embed_dim == 0 if spec.ffn == "mlp" else _swiglu_ratio(spec) is not None
    problems = [
        ("a position table that is not square", spec.table_grid[0] != spec.table_grid[1]),
        ("no LayerScale", not spec.layer_scale),
        ("no bias in the attention output or the feed-forward layers", not (spec.proj_bias and spec.ffn_bias)),
        (f"{spec.ffn_hidden} hidden channels, no whole multiple of its width", not is_default_hidden),
    ]
    if found := [text for text, is_problem in problems if is_problem]:
        raise CheckpointError(f"The huggingface layout cannot hold {spec.describe()}: it has {'; '.join(found)}.")
    has_registers = spec.num_register_tokens > 0
    config = {
        "architectures": ["Dinov2WithRegistersModel" if has_registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if has_registers else "dinov2",
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "mlp_ratio": spec.ffn_hidden // spec.embed_dim if spec.ffn == "mlp" else _swiglu_ratio(spec),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": spec.img_size[0],
        "patch_size": spec.patch_size,
        "num_channels": spec.in_chans,
        "qkv_bias": spec.qkv_bias,
        "use_swiglu_ffn": spec.ffn == "swiglu",
    }
    return config | ({"num_register_tokens": spec.num_register_tokens} if has_registers else {})


def _swiglu_ratio(spec: BackboneSpec) -> int | None:
    """The whole mlp_ratio that gives this SwiGLU width, or None."""
    return next((r for r in range(1, 17) if (int(spec.embed_dim * r * 2 / 3) + 7) // 8 * 8 == spec.ffn_hidden), None)
