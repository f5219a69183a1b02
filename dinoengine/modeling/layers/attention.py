"""Multi-head self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from dinoengine.modeling.layers.attention_kernels import KERNELS, Layout


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v within each sequence, with packed q, k, v."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"The width {dim} is not divisible by the number of attention heads {num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, layout: Layout, kernel: str = "sdpa", wanted: Tensor | None = None) -> Tensor:
        """[R, D] -> [R, D]; with ``wanted``, [P] indices of rows, only these: [P, D].

        Args:
            layout: which rows are one sequence.
            kernel: a key of ``attention_kernels.KERNELS``.
        """
        attended = KERNELS[kernel](self.qkv(x), self.num_heads, layout)
        return self.proj(attended if wanted is None else attended.index_select(0, wanted))
