"""Image -> patch tokens."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map (a convolution with stride = kernel).

    Keeps torch's default Conv2d initialisation, as the published models do.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, D], N = (H / patch) * (W / patch), row-major.

        Raises:
            ValueError: if H or W is not a multiple of the patch size.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Image size {height} x {width} is not a multiple of the patch size {self.patch_size}; "
                "resize or crop the images (INPUT.TEST.CROP_SIZE_PX in an evaluation)."
            )
        return self.proj(images).flatten(2).transpose(1, 2)
