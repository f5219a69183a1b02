"""One transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from dinoengine.modeling.layers.attention import Attention
from dinoengine.modeling.layers.drop_path import add_residual
from dinoengine.modeling.layers.layer_scale import LayerScale
from dinoengine.modeling.layers.mlp import FFN_LAYERS

LAYER_NORM_EPS = 1e-6


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with LayerScale and stochastic depth of its own draw.

    The residual stream ``x`` stays fp32 under autocast: with LayerScale at 1e-5 the branches are smaller than a bf16
    step of the stream, and a 16-bit sum would lose the early signal.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        layer_scale_init: float = 1e-5,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.ls1 = LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = FFN_LAYERS[ffn](dim, ratio=ffn_ratio, bias=ffn_bias)
        self.ls2 = LayerScale(dim, layer_scale_init) if layer_scale_init else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        drop_rate = self.drop_path_rate if self.training else 0.0
        x = add_residual(x, lambda y: self.ls1(self.attn(self.norm1(y))), drop_rate)
        return add_residual(x, lambda y: self.ls2(self.mlp(self.norm2(y))), drop_rate)
