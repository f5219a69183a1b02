"""What the shapes of a file say of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dinoengine.checkpoint.weights import BackboneSpec, ffn_ratio, not_allowed
from dinoengine.config import get_cfg
from dinoengine.modeling.backbone.vit import VisionTransformer
from tests.checkpoint.models import SMALL, SWIGLU, WITH_REGISTERS


@pytest.mark.parametrize("spec", [SMALL, SWIGLU, WITH_REGISTERS, replace(SMALL, ffn_hidden=131, table_grid=(2, 5))])
def test_the_config_options_build_the_same_model(spec: BackboneSpec) -> None:
    cfg = get_cfg()
    for key, value in spec.config_options().items():
        cfg.merge_from_list([key, value])
    built = VisionTransformer.from_config(cfg)
    model = VisionTransformer(**built)
    expected = spec.build("meta").state_dict()
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in expected.items()}
    assert (built["interpolate_antialias"], built["interpolate_offset"]) == (
        spec.interpolate_antialias,
        spec.interpolate_offset,
    )


def test_what_is_allowed_by_name() -> None:
    names = ["dino_head.mlp.0.weight", "mask_token", "norm.bias"]
    assert not_allowed(names, ["dino_head.*"]) == ["mask_token", "norm.bias"]
    assert not_allowed(names, ["*"]) == []


@pytest.mark.parametrize(
    ("ffn", "dim", "hidden", "ratio"),
    [("mlp", 384, 1536, 4.0), ("swiglu", 1024, 2736, 4.0), ("swiglu", 1536, 4096, 4.0)],
)
def test_published_ffn_widths(ffn: str, dim: int, hidden: int, ratio: float) -> None:
    assert ffn_ratio(ffn, dim, hidden) == ratio


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_every_ffn_width_has_a_ratio(ffn: str) -> None:
    for dim in (48, 49, 384):
        for hidden in range(8, 300, 8 if ffn == "swiglu" else 1):
            ratio = ffn_ratio(ffn, dim, hidden)
            inner = int(dim * ratio)
            assert (inner if ffn == "mlp" else (int(inner * 2 / 3) + 7) // 8 * 8) == hidden
