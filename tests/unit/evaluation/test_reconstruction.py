from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from support.photograph_crops import draw_crops

from fqgan_dist.evaluation.reconstruction import PAPER_SSIM_RANGE, compute_psnr, compute_ssim


def draw_pair() -> tuple[torch.Tensor, torch.Tensor]:
    references = draw_crops(1, 0)
    noise = torch.randn(references.shape, generator=torch.Generator().manual_seed(0)) * 12
    return (references + noise).round().clamp(0, 255).to(torch.uint8), references


def to_arrays(images: torch.Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).numpy())


def test_psnr_equals_scikit_image():
    images, references = draw_pair()
    expected = [
        peak_signal_noise_ratio(b, a)
        for a, b in zip(to_arrays(images), to_arrays(references), strict=True)
    ]
    np.testing.assert_allclose(compute_psnr(images, references).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("data_range", [255.0, PAPER_SSIM_RANGE])
def test_ssim_equals_scikit_image(data_range: float):
    images, references = draw_pair()
    expected = [
        structural_similarity(a, b, channel_axis=-1, data_range=data_range)
        for a, b in zip(to_arrays(images), to_arrays(references), strict=True)
    ]
    found = compute_ssim(images, references, data_range=data_range)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_paper_range_is_the_published_protocol_on_unit_images():
    images, references = draw_pair()
    expected = [
        structural_similarity(a / 255.0, b / 255.0, channel_axis=-1, data_range=2.0)
        for a, b in zip(to_arrays(images), to_arrays(references), strict=True)
    ]
    found = compute_ssim(images, references, data_range=PAPER_SSIM_RANGE)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_equal_images_are_perfect():
    images, _ = draw_pair()
    assert compute_psnr(images, images).isposinf().all()
    np.testing.assert_allclose(compute_ssim(images, images).numpy(), 1.0, rtol=1e-12)


def test_bad_shapes_are_refused():
    images, references = draw_pair()
    with pytest.raises(ValueError, match="two equal"):
        compute_psnr(images, references[1:])
    with pytest.raises(ValueError, match="two equal"):
        compute_ssim(images[0], references[0])
    with pytest.raises(ValueError, match="at least 7"):
        compute_ssim(images[..., :6], references[..., :6])
