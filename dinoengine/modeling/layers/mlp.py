"""The feed-forward half of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, ratio: float = 4.0, bias: bool = True) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(SiLU(a) * b) with (a, b) = w12(x) (arXiv:2002.05202).

    The hidden width is 2/3 of the MLP's, rounded up to a multiple of 8: 2736 at 1024 wide, 4096 at 1536 wide.
    """

    def __init__(self, dim: int, ratio: float = 4.0, bias: bool = True) -> None:
        super().__init__()
        hidden = (int(int(dim * ratio) * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


FFN_LAYERS: dict[str, type[Mlp] | type[SwiGLU]] = {"mlp": Mlp, "swiglu": SwiGLU}
