"""PSNR and SSIM of reconstructions, per image, in float64; equal to scikit-image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

UINT8_RANGE = 255.0
"""Range of 8-bit images."""
PAPER_SSIM_RANGE = 510.0
"""FQGAN's evaluation states range 2 for images in [0, 1] (8-bit: 510), which inflates SSIM."""

SSIM_WINDOW = 7
"""Side of the window of SSIM, pixels: no image may be smaller."""
_K1 = 0.01
_K2 = 0.03


def compute_psnr(images: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio.

    Args:
        images: (B, C, H, W), values in [0, 255], uint8 or float.
        references: the same.

    Returns:
        (B,) float64, dB; infinite for equal images.

    Raises:
        ValueError: shapes differ or are not (B, C, H, W).
    """
    _check_shapes(images, references)
    # Per image: the mean of PSNRs is reported, not the PSNR of the mean error, which one bad image
    # would rule.
    error = (images.double() - references.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(UINT8_RANGE**2 / error)


def compute_ssim(images: Tensor, references: Tensor, *, data_range: float = UINT8_RANGE) -> Tensor:
    """Compute the structural similarity: 7x7 uniform window, sample covariance, mean over channels.

    Args:
        images: (B, C, H, W), values in [0, 255], uint8 or float; sides of at least 7 pixels.
        references: the same.
        data_range: `UINT8_RANGE`, or `PAPER_SSIM_RANGE` for the published numbers.

    Returns:
        (B,) float64, at most 1.

    Raises:
        ValueError: shapes differ, are not (B, C, H, W), or are smaller than the window.
    Source: Wang et al. 2004, as scikit-image's `structural_similarity` with default arguments.
    """
    _check_shapes(images, references)
    if min(images.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"images: {tuple(images.shape[2:])} pixels - expected at least {SSIM_WINDOW} x "
            f"{SSIM_WINDOW}"
        )
    x, y = images.double(), references.double()
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    var_x = unbiased * (_window_mean(x * x) - mean_x * mean_x)
    var_y = unbiased * (_window_mean(y * y) - mean_y * mean_y)
    cov = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    similarity /= (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return similarity.mean(dim=(1, 2, 3))


def _window_mean(x: Tensor) -> Tensor:
    # Windows inside the image only: scikit-image crops the border before it averages.
    return functional.avg_pool2d(x, SSIM_WINDOW, stride=1)


def _check_shapes(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape or images.ndim != 4:
        raise ValueError(
            f"images: shapes {tuple(images.shape)} and {tuple(references.shape)} - expected two "
            "equal (B, C, H, W)"
        )
