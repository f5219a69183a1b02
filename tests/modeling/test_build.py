"""Names in configs become modules."""

from __future__ import annotations

import pytest

from dinoengine.modeling import (
    BACKBONE_REGISTRY,
    HEAD_REGISTRY,
    META_ARCH_REGISTRY,
    DINOv2,
    build_backbone,
    build_model,
)


def test_what_ships_is_registered() -> None:
    assert META_ARCH_REGISTRY.names() == ["DINOv2", "ImageClassifier"]
    assert BACKBONE_REGISTRY.names() == ["VisionTransformer"]
    assert HEAD_REGISTRY.names() == ["DINOHead"]


def test_the_config_names_the_method(tiny_cfg) -> None:
    model = build_model(tiny_cfg)
    assert isinstance(model, DINOv2)
    assert model.training


@pytest.mark.parametrize(
    ("key", "wrong", "message"),
    [
        ("MODEL.META_ARCHITECTURE", "DINOv3", r"No 'DINOv3' in the META_ARCH registry \(did you mean 'DINOv2'\?\)"),
        ("MODEL.BACKBONE.NAME", "ViT", r"No 'ViT' in the BACKBONE registry.*Registered: VisionTransformer"),
        ("MODEL.DINO_HEAD.NAME", "DINOhead", r"No 'DINOhead' in the HEAD registry \(did you mean 'DINOHead'\?\)"),
    ],
)
def test_unknown_names_list_what_exists(tiny_cfg, key: str, wrong: str, message: str) -> None:
    tiny_cfg.merge_from_list([key, wrong])
    with pytest.raises(KeyError, match=message):
        build_model(tiny_cfg)


def test_a_backbone_can_be_built_alone(tiny_cfg) -> None:
    assert build_backbone(tiny_cfg).embed_dim == 16
