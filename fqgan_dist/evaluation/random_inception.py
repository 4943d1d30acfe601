"""Random weights for Inception with which an FID still tells good images from bad ones.

With default initialisation features vanish and every FID is 0. Here filters are seeded normal
numbers, and the BatchNorm statistics are those of a fixed batch of smooth coloured noise, whose
spectrum is that of photographs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fqgan_dist.randomness import numpy_generator
from fqgan_dist.weights.tensors import draw_normal

# A deep random ReLU network is chaotic: small differences grow from layer to layer, so the distance
# of two samples of one set depends on the seed and is large. A bias keeps most ReLUs open: the
# network is nearly linear, and near images stay near. The first layer sees little of an image's
# mean colour, in which photographs differ most. Measured at 75 px with two times 264 crops of 64 px
# of one set of photographs, in units of FID(photographs, other crops), seeds 0 and 1:
#
#     neither measure:  FID 38000, 11000; noise 154, 479; blocks of 4 x 4 pixels 5.0, 3.5
#     bias alone:       FID 159, 140;     noise 115, 158; blocks 7.9, 8.4
#     both:             FID 236, 204;     noise 278, 252; blocks 9.3, 9.4
STEM_BIAS = 1.0
"""BatchNorm bias before the first Mixed block, in standard deviations."""
BLOCK_BIAS = 16.0
"""BatchNorm bias in the Mixed blocks, in standard deviations."""

FIRST_LAYER_MEAN = 0.25
"""Share of their mean that the first layer's filters keep: photographs differ in colour first of
all."""

_FIRST_FILTERS = "Conv2d_1a_3x3.conv.weight"
_CALIBRATION_IMAGES = 32
_FEWEST_IMAGES = 4
_SMALL_RESOLUTION = 96
_CALIBRATION_SIZE = 64
_SPECTRUM_EXPONENT = 1.5


def fill_random_inception(network: FeatureExtractorInceptionV3, *, seed: int) -> None:
    """Fill torch-fidelity's InceptionV3 in place; the same bits on every machine."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                numbers = draw_normal(parameter.shape, seed, "inception", name)
                if name == _FIRST_FILTERS:
                    numbers -= (1 - FIRST_LAYER_MEAN) * numbers.mean(dim=(2, 3), keepdim=True)
                parameter.copy_(numbers * math.sqrt(2.0 / math.prod(parameter.shape[1:])))
            elif name.endswith("bn.bias"):
                parameter.fill_(BLOCK_BIAS if name.startswith("Mixed") else STEM_BIAS)
            else:
                # The other vectors: BatchNorm's scale, and the bias of the unused biased logits.
                parameter.fill_(1.0 if name.endswith("bn.weight") else 0.0)
    # As many values per BatchNorm at any resolution, roughly: at 299 px float64 takes its time.
    area_ratio = (_SMALL_RESOLUTION / network.INPUT_IMAGE_SIZE) ** 2
    count = max(_FEWEST_IMAGES, round(_CALIBRATION_IMAGES * min(1.0, area_ratio)))
    _calibrate(network, draw_smooth_images(seed)[:count])


def draw_smooth_images(seed: int) -> Tensor:
    """Draw the calibration batch: smooth noise of one hue per image, (32, 3, 64, 64) uint8."""
    count, size = _CALIBRATION_IMAGES, _CALIBRATION_SIZE
    generator = numpy_generator(seed, "inception calibration")
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequencies[0, 0] = 1.0 / size
    channels = generator.standard_normal((count, 4, size, size))
    smooth = np.fft.ifft2(np.fft.fft2(channels) / frequencies**_SPECTRUM_EXPONENT).real
    smooth /= smooth.std(axis=(2, 3), keepdims=True)
    images = smooth[:, :1] + 0.4 * smooth[:, 1:]
    images = (images - images.mean(axis=(1, 2, 3), keepdims=True)) / images.std(
        axis=(1, 2, 3), keepdims=True
    )
    contrast = generator.uniform(20, 60, (count, 1, 1, 1))
    brightness = generator.uniform(60, 200, (count, 1, 1, 1))
    tint = generator.uniform(-30, 30, (count, 3, 1, 1))
    pixels = np.clip(images * contrast + brightness + tint, 0, 255)
    return torch.from_numpy(pixels.astype(np.uint8))


@torch.no_grad()
def _calibrate(network: FeatureExtractorInceptionV3, images: Tensor) -> None:
    """Set every BatchNorm's statistics to those of a batch."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    # Float64, then rounded to 8 bits: sums in another order (threads, kind of CPU) give the same
    # network.
    network.double().train()
    network.feature_extractor_internal_dtype = torch.float64
    network(images)
    network.float().eval()
    network.feature_extractor_internal_dtype = torch.float32
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(norm.running_mean.bfloat16())
        norm.running_var.copy_(norm.running_var.bfloat16())
