"""The kernel of a patch embedding for another patch size or other channels, and the images that show it is the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: B images, C channels, D features, p pixels along the edge of a patch.


def _resampling_matrix(old: int, new: int) -> Tensor:
    """R, [new, old] float64: R x is the signal x of ``old`` samples resampled to ``new``, linearly, by pixel centres."""
    impulses = torch.eye(old, dtype=torch.float64).unsqueeze(0)  # [1, impulse, sample]
    return F.interpolate(impulses, size=new, mode="linear", align_corners=False)[0].T


def resample_kernel(kernel: Tensor, patch_size: int) -> Tensor:
    """The kernel that sees in resampled patches what the given one sees in the originals (FlexiViT, arXiv:2212.08013, 3.4).

    With B the bilinear resampling of a patch x, the new kernel is the least-squares solution of <w', B x> = <w, x>:
    w' = pinv(B^T) w. It is exact for every x where the patch grows, as B loses nothing then. Scaling the kernel as if it
    were a picture changes the size of the tokens instead.

    Args:
        kernel: [D, C, p, p].
        patch_size: the new edge.

    Returns:
        [D, C, patch_size, patch_size] in the dtype of ``kernel``, computed in float64.
    """
    inverse = torch.linalg.pinv(_resampling_matrix(kernel.shape[-1], patch_size).T)  # B is R along rows and columns
    return (inverse @ kernel.double() @ inverse.T).to(kernel.dtype)


def resample_patches(images: Tensor, old: int, new: int) -> Tensor:
    """Every patch resampled on its own, as ``resample_kernel`` assumes: [B, C, h old, w old] -> [B, C, h new, w new].

    Resampling the image as a whole differs at the borders of patches, where it mixes neighbours.
    """
    batch, channels, height, width = images.shape
    patches = images.double().reshape(batch, channels, height // old, old, width // old, old)
    matrix = _resampling_matrix(old, new)
    resampled = torch.einsum("bcipjq,Pp,Qq->bciPjQ", patches, matrix, matrix)
    return resampled.reshape(batch, channels, height // old * new, width // old * new).to(images.dtype)


def mix_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """The kernel for another number of channels.

    With m the smaller of both numbers, an image of m channels gives the same tokens when old and new kernel each see it
    with its channels repeated cyclically (``repeat_channels``). So an image that is grey, repeated in all channels, gives
    the same tokens. Fewer channels are sums (3 -> 1: the sum of all three); more are copies, each divided by how often its
    original occurs.

    Args:
        kernel: [D, C, p, p].

    Returns:
        [D, in_chans, p, p].
    """
    fewer = min(kernel.shape[1], in_chans)
    sums = [kernel[:, i::fewer].sum(dim=1) / len(range(i, in_chans, fewer)) for i in range(fewer)]
    return torch.stack([sums[i % fewer] for i in range(in_chans)], dim=1)


def repeat_channels(images: Tensor, in_chans: int) -> Tensor:
    """[B, m, H, W] -> [B, in_chans, H, W]: channel i is channel i mod m."""
    return images[:, [i % images.shape[1] for i in range(in_chans)]]
