"""Crops of real photographs as one batch of tensors."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fqgan_dist.sharding.photographs import PHOTOGRAPHS, crop_photograph

IMAGE_SIZE = 64


@lru_cache
def draw_crops(crops_per_photograph: int, seed: int) -> Tensor:
    """Cut crops of the training parts, (n, 3, 64, 64) uint8, photograph after photograph."""
    images = [
        _to_array(crop_photograph(name, number, "train", IMAGE_SIZE, seed))
        for name in PHOTOGRAPHS
        for number in range(crops_per_photograph)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def draw_noise(count: int, seed: int = 0) -> Tensor:
    """Draw images of independent uniform pixels, (count, 3, 64, 64) uint8."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _to_array(data: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    margin = (len(pixels) - IMAGE_SIZE) // 2
    return pixels[margin : margin + IMAGE_SIZE, margin : margin + IMAGE_SIZE]
