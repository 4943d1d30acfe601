"""The quickstart's images: crops of photographs that scikit-image's wheel carries.

    fqgan-data shard builtin:photographs data/photographs/train name=photographs split=train

Nothing is downloaded. The class of a crop is its photograph, so a class-conditional generator can
be seen to work. The right part of every photograph is reserved for validation: no crop for training
shares a pixel with one for validation.
"""

from __future__ import annotations

import importlib.resources
import io
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from PIL import Image
from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.errors import DataError
from fqgan_dist.randomness import numpy_generator

Split = Literal["train", "val"]

# All are wider than high or square, colour and grayscale, objects and textures.
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
PHOTOGRAPHS = tuple(_FILES)
"""Names of the photographs, which are the classes, sorted."""

_HEIGHT_RATIO = 2.5
"""Height of the reduced photograph per image size: an image then shows 0.4 of the height, enough to
recognise a face, a cup or a wheel (seen on contact sheets at 64 pixels)."""
_TRAINING_CROP_RATIO = 1.25
"""Stored crop per image size for training: the room that random resized crops need."""


class PhotographsConfig(Config):
    """How crops are taken from the photographs."""

    image_size: int = Field(default=64, ge=16, le=1024)
    """Pixels of the images that will be trained on; crops are 1.25 times as large for training."""
    crops_per_photograph: int = Field(default=64, ge=1, le=99_999)
    """Crops of each photograph."""
    seed: int = Field(default=0, ge=0)
    """Seed of the crops' places."""


def sample_photographs(
    split: Split, *, image_size: int, crops_per_photograph: int, seed: int
) -> Iterator[tuple[str, str, bytes]]:
    """Give all crops of a split.

    Yields:
        Class name, sample name `<class>/<class>_<number>.png`, and the PNG file.
    """
    for class_name in PHOTOGRAPHS:
        for number in range(crops_per_photograph):
            name = f"{class_name}/{class_name}_{number:05d}.png"
            yield class_name, name, crop_photograph(class_name, number, split, image_size, seed)


def crop_photograph(
    class_name: str, number: int, split: Split, image_size: int, seed: int
) -> bytes:
    """Cut one crop, a pure function of its arguments.

    Returns:
        A PNG file, square: 1.25 x `image_size` for training; `image_size` for validation, where the
        image is used as it is.
    """
    part = _reduced_part(class_name, split, image_size)
    ratio = _TRAINING_CROP_RATIO if split == "train" else 1.0
    size = round(ratio * image_size)
    # Keyed by the crop, so that more crops or other splits leave the former ones as they are.
    random = numpy_generator(seed, "photograph", split, class_name, number)
    left = int(random.integers(part.width - size + 1))
    top = int(random.integers(part.height - size + 1))
    file = io.BytesIO()
    part.crop((left, top, left + size, top + size)).save(file, "PNG")
    return file.getvalue()


@lru_cache(maxsize=2 * len(PHOTOGRAPHS))
def _reduced_part(class_name: str, split: Split, image_size: int) -> Image.Image:
    """Load the part of a photograph that belongs to a split, reduced to the crops' scale."""
    photograph = _load_photograph(_FILES[class_name])
    width, height = photograph.size
    # A third, or what a validation crop needs where the photograph is square.
    reserved = max(round(width / 3), math.ceil(height / _HEIGHT_RATIO))
    border = width - reserved
    box = (0, 0, border, height) if split == "train" else (border, 0, width, height)
    scale = round(_HEIGHT_RATIO * image_size) / height
    # Cut first, then resize: the filter must not carry pixels over the border.
    part = photograph.crop(box)
    size = (round(part.width * scale), round(height * scale))
    return part.resize(size, Image.Resampling.LANCZOS)


def _load_photograph(file_name: str) -> Image.Image:
    path = importlib.resources.files("skimage.data") / file_name
    try:
        with path.open("rb") as file:
            photograph = Image.open(file)
            photograph.load()
    except FileNotFoundError as error:
        raise DataError(
            f"builtin:photographs: this scikit-image has no {file_name!r}; "
            "install scikit-image 0.25 or 0.26, or shard a folder of images"
        ) from error
    return photograph
