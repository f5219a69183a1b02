"""Activation checkpointing: the same gradients from less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from dinoengine.engine.living_storages import LivingStorages
from dinoengine.modeling.backbone import Execution, VisionTransformer
from dinoengine.modeling.layers.checkpointing import _policy


def _step(mode: str) -> tuple[list[Tensor], int]:
    """Gradients of all parameters, and the bytes that the forward pass leaves behind for the backward pass."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=(32, 32),
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        layer_scale_init=0.5,
        drop_path_rate=0.3,
        execution=Execution(activation_checkpointing=mode),
    ).train()
    images = torch.randn(8, 3, 32, 32)
    rows = torch.tensor([0, 5, 200])
    with LivingStorages(vit.parameters()) as storages:
        (tokens,) = vit.pick_tokens([images], [None], [rows])
    kept = storages.num_bytes()
    # Weights that differ: a plain sum of normed tokens has no gradient but rounding.
    (tokens.cls_token * torch.linspace(-1, 1, 32)).sum().add(
        (tokens.patches * torch.linspace(1, 2, 32)).sum()
    ).backward()
    gradients = [p.grad for name, p in vit.named_parameters() if name != "mask_token"]
    return gradients, kept  # type: ignore[return-value]


def test_gradients_are_the_same_and_memory_falls() -> None:
    plain, most = _step("none")
    some_gradients, some = _step("selective")
    fewest_gradients, fewest = _step("full")
    for expected, selective, full in zip(plain, some_gradients, fewest_gradients, strict=True):
        assert torch.equal(expected, selective)
        assert torch.equal(expected, full)
    assert 0 < fewest < 0.5 * some
    assert some < 0.85 * most


def test_selective_keeps_what_kernels_of_packed_attention_give() -> None:
    """They run on CUDA alone; what is kept goes by the names of their operators."""
    from torch.nn.attention import varlen  # noqa: F401  # registers its operator

    assert _policy(None, torch.ops.torch_attn._varlen_attn.default) == CheckpointPolicy.MUST_SAVE
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention.default
    for kept in (sdpa, torch.ops.aten.addmm.default, "xformers_flash::flash_fwd", "xformers_flash3::flash_fwd"):
        assert _policy(None, kept) == CheckpointPolicy.MUST_SAVE
    for again in (
        torch.ops.aten.gelu.default,
        torch.ops.aten.native_layer_norm.default,
        torch.ops.aten.index_add.default,
    ):
        assert _policy(None, again) == CheckpointPolicy.PREFER_RECOMPUTE


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of none, selective, full; got 'half'"):
        _step("half")


def test_evaluation_keeps_nothing_and_needs_no_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr("dinoengine.modeling.backbone.vit.run_checkpointed", fail)
    vit = VisionTransformer(img_size=(8, 8), patch_size=4, embed_dim=8, depth=1, num_heads=2)
    vit.eval()(torch.randn(1, 3, 8, 8))
    with pytest.raises(AssertionError):
        vit.train()(torch.randn(1, 3, 8, 8))
