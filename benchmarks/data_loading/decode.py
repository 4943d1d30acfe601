"""Images per second and core: our fast mode against the pipeline of the reference.

The reference is what FQGAN's published training code does to an image: Pillow decodes it whole,
ADM's rule resizes it (halvings with a BOX filter, then one bicubic step), a random square is cut
out and perhaps mirrored, and the result becomes a normalised float32 tensor. Our fast mode leaves
uint8 and the normalisation to the device. Both get the same draws, so they show the same crops.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from benchmarks.data_loading.images import make_shards, read_dataset, read_images, write_tree
from benchmarks.data_loading.settings import Settings
from benchmarks.paired import Finding, Rounds, WrongResultError, run_rounds
from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.view_loading import load_view
from fqgan_dist.data.views import CropRecord

SUBJECT = "decode"
REFERENCE = "reference, originals"
_FAST = "fast, originals"
_FAST_SHARDS = "fast, short side {side} q{quality}"
_DECODE_ONLY = "decoding alone, short side {side} q{quality}"
_ORIGINALS_TARGET, _SHARDS_TARGET = 2.0, 3.5
_STORED_RATIO = 1.25
"""Stored short side over crop size: the largest scale that the random crop asks for."""
_UNIT = "images/s per core"
_SEED = 0
_MAX_MEAN_DIFFERENCE = 6.0
"""Largest mean absolute difference, in levels of 255, of a fast crop to the reference's."""


def measure(settings: Settings, folder: Path) -> list[Finding]:
    """Compare decoding from originals and from shards of reduced images with the reference.

    Raises:
        WrongResultError: a crop is not the one that it should be.
    """
    images = [image.data for image in read_images(settings.images, settings.max_images)]
    size = settings.image_size
    crops = check_views(images, size)
    side = int(size * _STORED_RATIO)
    contestants: dict[str, Callable[[], float]] = {
        REFERENCE: partial(time_reference, images, size, crops),
        _FAST: partial(time_fast, images, size),
    }
    write_tree(read_images(settings.images, settings.max_images), folder / "tree")
    for quality in settings.qualities:
        destination = folder / f"q{quality}"
        policy = (f"short_side={side}", f"jpeg_quality={quality}")
        stored = read_dataset(make_shards(folder / "tree", destination, *policy))
        check_views(stored, size)
        names = {"side": side, "quality": quality}
        contestants[_FAST_SHARDS.format(**names)] = partial(time_fast, stored, size)
        contestants[_DECODE_ONLY.format(**names)] = partial(time_decoding, stored)
    rounds = run_rounds(contestants, control=REFERENCE, rounds=settings.rounds)
    return _describe(rounds, len(images))


def reference_pipeline(data: bytes, size: int, crop: CropRecord) -> Tensor:
    """Make a training image as the reference does.

    Args:
        data: an encoded image.
        size: side of the crop.
        crop: what the reference draws at random: short side, place and mirroring.

    Returns:
        (3, size, size) float32 in [-1, 1].
    """
    with Image.open(io.BytesIO(data)) as file:
        image = file.convert("RGB")
    short_side = min(crop.resized_height, crop.resized_width)
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short_side / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(target, Image.Resampling.BICUBIC))
    square = pixels[crop.top : crop.top + size, crop.left : crop.left + size]
    picture = Image.fromarray(square)
    if crop.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = transforms.to_dtype(transforms.pil_to_tensor(picture), torch.float32, scale=True)
    return transforms.normalize(tensor, [0.5] * 3, [0.5] * 3, inplace=True)


def fast_view(data: bytes, size: int, number: int) -> tuple[np.ndarray, CropRecord]:
    """Make a training image by our fast mode: (3, size, size) uint8."""
    return _load_view(data, _view(size, "fast"), number)


def check_views(images: Sequence[bytes], size: int) -> list[CropRecord]:
    """Check both pipelines on every image and give the crops that they show.

    Raises:
        WrongResultError: the written-out reference differs from our `reference` mode by a bit, or
            the fast mode shows another crop or other pixels than filters may explain.
    """
    crops: list[CropRecord] = []
    for number, data in enumerate(images):
        expected, crop = _load_view(data, _view(size, "reference"), number)
        written_out = reference_pipeline(data, size, crop).add(1).mul(127.5).round()
        if not np.array_equal(written_out.byte().numpy(), expected):
            raise WrongResultError(f"image {number}: the reference pipeline gives other pixels")
        pixels, fast_crop = fast_view(data, size, number)
        if fast_crop != crop:
            raise WrongResultError(f"image {number}: fast mode shows {fast_crop}, not {crop}")
        difference = float(np.abs(pixels.astype(int) - expected).mean())
        if difference > _MAX_MEAN_DIFFERENCE:
            raise WrongResultError(
                f"image {number}: the fast crop differs by {difference:.1f} levels on average; "
                f"expected at most {_MAX_MEAN_DIFFERENCE}"
            )
        crops.append(crop)
    return crops


def time_reference(images: Sequence[bytes], size: int, crops: Sequence[CropRecord]) -> float:
    """Give the CPU seconds per image of the reference pipeline."""
    start = time.process_time()
    for data, crop in zip(images, crops, strict=True):
        reference_pipeline(data, size, crop)
    return (time.process_time() - start) / len(images)


def time_fast(images: Sequence[bytes], size: int) -> float:
    """Give the CPU seconds per image of our fast mode."""
    start = time.process_time()
    for number, data in enumerate(images):
        fast_view(data, size, number)
    return (time.process_time() - start) / len(images)


def time_decoding(images: Sequence[bytes]) -> float:
    """Give the CPU seconds per image of libjpeg-turbo alone, the floor of any whole decode."""
    start = time.process_time()
    for data in images:
        decode_jpeg(data, colorspace="RGB")
    return (time.process_time() - start) / len(images)


def _view(size: int, mode: str) -> ViewConfig:
    return ViewConfig.model_validate(
        {"policy": "random_crop_flip", "image_size": size, "mode": mode}
    )


def _load_view(data: bytes, view: ViewConfig, number: int) -> tuple[np.ndarray, CropRecord]:
    key = f"image{number}"
    return load_view(data, view, seed=_SEED, key=key, view=0, name=key)


def _describe(rounds: Rounds, num_images: int) -> list[Finding]:
    findings = [rounds.show(REFERENCE, unit=_UNIT, subject=SUBJECT, note=f"{num_images} JPEGs")]
    for name in rounds.costs:
        target = _SHARDS_TARGET if name.startswith("fast") else None
        target = _ORIGINALS_TARGET if name == _FAST else target
        if name != REFERENCE:
            findings.append(
                rounds.compare(name, over=REFERENCE, target=target, unit=_UNIT, subject=SUBJECT)
            )
    return findings
