"""What the kernel of a patch embedding keeps when its patch or its channels change."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dinoengine.checkpoint.patch_kernel import mix_channels, repeat_channels, resample_kernel, resample_patches


def _tokens(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return F.conv2d(images, kernel, stride=kernel.shape[-1])


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("old", "new"), [(2, 3), (7, 8), (8, 16), (14, 16), (14, 28), (16, 32), (4, 4), (1, 5)])
def test_upsampled_patches_give_the_same_tokens(old: int, new: int) -> None:
    kernel, images = _random(6, 3, old, old), _random(2, 3, 3 * old, 5 * old)
    got = _tokens(resample_patches(images, old, new), resample_kernel(kernel, new))
    torch.testing.assert_close(got, _tokens(images, kernel), rtol=1e-4, atol=1e-4)


def test_a_patch_is_upsampled_as_torch_does_it() -> None:
    patch = _random(2, 3, 5, 5)
    expected = F.interpolate(patch, size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resample_patches(patch, 5, 8), expected)
    pair = torch.cat((patch, -patch), dim=3)  # neighbours do not mix
    torch.testing.assert_close(resample_patches(pair, 5, 8), torch.cat((expected, -expected), dim=3))


def test_a_smaller_kernel_is_the_best_there_is() -> None:
    """No other kernel is nearer to the old tokens on downsampled patches of white noise: the residual is orthogonal."""
    kernel, old, new = _random(1, 1, 6, 6), 6, 4
    impulses = torch.eye(old * old).reshape(-1, 1, old, old)
    seen = resample_patches(impulses, old, new).flatten(1)  # [old^2, new^2], row i: what becomes of impulse i
    residual = seen @ resample_kernel(kernel, new).flatten() - kernel.flatten()
    assert residual.norm() > 0.1
    torch.testing.assert_close(seen.T @ residual, torch.zeros(new * new), rtol=0, atol=1e-5)


def test_tokens_keep_their_size_where_a_resampled_picture_of_the_kernel_would_not() -> None:
    kernel = torch.ones(1, 1, 4, 4)
    assert resample_kernel(kernel, 8).sum().item() == pytest.approx(16, rel=1e-5)
    assert F.interpolate(kernel, size=(8, 8), mode="bilinear").sum().item() == 64


@pytest.mark.parametrize("old", [1, 2, 3, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 7])
def test_an_image_repeated_in_the_channels_gives_the_same_tokens(old: int, new: int) -> None:
    kernel = _random(5, old, 4, 4)
    mixed = mix_channels(kernel, new)
    assert mixed.shape == (5, new, 4, 4)
    for channels in {1, min(old, new)}:  # grey, and every channel that both have
        images = _random(2, channels, 8, 12)
        got = _tokens(repeat_channels(images, new), mixed)
        torch.testing.assert_close(got, _tokens(repeat_channels(images, old), kernel), rtol=1e-4, atol=1e-4)


def test_channels_by_hand() -> None:
    kernel = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    assert mix_channels(kernel, 1).flatten().tolist() == [7]
    assert mix_channels(kernel, 2).flatten().tolist() == [5, 2]
    assert mix_channels(kernel, 4).flatten().tolist() == [0.5, 2, 4, 0.5]
    assert mix_channels(kernel[:, :1], 4).flatten().tolist() == [0.25] * 4
    assert torch.equal(mix_channels(kernel, 3), kernel)
