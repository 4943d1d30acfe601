"""Views: how an image becomes a square crop, as a pure function of (seed, key, view).

Where a view lies is arithmetic on the image's size (`place_view`); three policies do it as the
reference does. Its pixels are made in one of two ways, `ViewConfig.mode`: here, exactly as in the
reference (LlamaGen's and ADM's functions: halvings with a BOX filter while the short side is at
least twice the target, then one bicubic step), or by `fast_views`. Callers use `view_loading`.

Source: FQGAN, arXiv 2411.16681, preprocessing of its published code; ten crops as in torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fqgan_dist.data.config import ViewConfig, ViewPolicy
from fqgan_dist.data.decoding import DEFAULT_MAX_PIXELS
from fqgan_dist.errors import DataError
from fqgan_dist.randomness import philox_words

_TEN_CROP_PLACES = 5


@dataclass(frozen=True)
class CropRecord:
    """Which part of an image a view shows: crop the resized image, then mirror it if `flip`."""

    top: int
    """First row of the crop in the resized, not mirrored image."""
    left: int
    """First column of the crop in the resized, not mirrored image."""
    resized_height: int
    """Height of the resized image."""
    resized_width: int
    """Width of the resized image."""
    flip: bool
    """Whether the crop is mirrored left to right."""

    @property
    def short_side(self) -> int:
        """Short side of the resized image."""
        return min(self.resized_height, self.resized_width)


def num_views(policy: ViewPolicy) -> int | None:
    """Count the views of a policy; None where there are as many as one asks for."""
    match policy:
        case "random_crop_flip":
            return None
        case "ten_crop":
            return 2 * _TEN_CROP_PLACES
        case "center":
            return 1


def apply_view(
    image: Image.Image, config: ViewConfig, *, seed: int, key: str, view: int
) -> tuple[np.ndarray, CropRecord]:
    """Crop an image; an image smaller than the target is enlarged by the same rule.

    Args:
        image: RGB.
        config: the policy and its sizes.
        seed: seed of the run; like `key`, it matters to `random_crop_flip` alone.
        key: the sample's key.
        view: a number that the random crop is drawn for, or the number of the fixed crop.

    Returns:
        The crop, (H, W, 3) uint8, and where it was taken from.

    Raises:
        ValueError: the image is not RGB, or the policy has no such view.
        DataError: the image is so long and thin that resizing it would take too much memory.
    """
    if image.mode != "RGB":
        raise ValueError(f"sample {key!r}: image mode {image.mode!r}; expected 'RGB'")
    name = f"sample {key!r}"
    crop = place_view(image.width, image.height, config, seed=seed, key=key, view=view, name=name)
    resized = resize_short_side(image, crop.short_side, name=name)
    return cut(resized, crop, config.image_size), crop


def place_view(
    width: int, height: int, config: ViewConfig, *, seed: int, key: str, view: int, name: str
) -> CropRecord:
    """Find which part of an upright image of a size a view shows; arguments as `load_view`'s.

    Raises:
        ValueError: the policy has no such view.
        DataError: the image is so long and thin that resizing it would take too much memory.
    """
    count = num_views(config.policy)
    if view < 0 or (count is not None and view >= count):
        raise ValueError(f"view {view}: policy {config.policy!r} has views 0 to {(count or 0) - 1}")
    size = config.image_size
    match config.policy:
        case "random_crop_flip":
            return _place_random_crop(
                width, height, config, seed=seed, key=key, view=view, name=name
            )
        case "ten_crop":
            resized_width, resized_height = find_resize_sizes(
                width, height, config.ten_crop_side, name=name
            )[-1]
            return _place_ten_crop(resized_width, resized_height, config, view)
        case "center":
            resized_width, resized_height = find_resize_sizes(width, height, size, name=name)[-1]
            return CropRecord(
                top=(resized_height - size) // 2,
                left=(resized_width - size) // 2,
                resized_height=resized_height,
                resized_width=resized_width,
                flip=False,
            )


def find_fault_of_shape(width: int, height: int, short_side: int) -> str | None:
    """Say why no view of a short side can be made of an image of a size; None if one can."""
    ratio = short_side / min(width, height)
    if width * ratio * height * ratio <= DEFAULT_MAX_PIXELS:
        return None
    return (
        f"an image of {width}x{height} pixels, resized to a short side of {short_side}, would "
        f"have more than {DEFAULT_MAX_PIXELS} pixels"
    )


def find_resize_sizes(
    width: int, height: int, short_side: int, *, name: str
) -> list[tuple[int, int]]:
    """List the sizes (width, height) that ADM's resize to a short side goes through.

    Returns:
        One size for each halving, then the last.

    Raises:
        DataError: the result would have more pixels than the decoding limit.
    """
    if fault := find_fault_of_shape(width, height, short_side):
        raise DataError(f"{name}: {fault}; remove it")
    # ADM's chain, of which the reference images of every score are made: whole halvings by a box
    # filter, then one bicubic step. Any other resize moves rFID.
    sizes = []
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
        sizes.append((width, height))
    scale = short_side / min(width, height)
    return [*sizes, (round(width * scale), round(height * scale))]


def resize_short_side(image: Image.Image, short_side: int, *, name: str) -> Image.Image:
    """Resize an image so that its short side has a length, as ADM does.

    Raises:
        DataError: the result would have more pixels than the decoding limit.
    """
    *halvings, target = find_resize_sizes(image.width, image.height, short_side, name=name)
    for size in halvings:
        image = image.resize(size, Image.Resampling.BOX)
    return image.resize(target, Image.Resampling.BICUBIC)


def cut(resized: Image.Image, crop: CropRecord, size: int) -> np.ndarray:
    """Cut a recorded crop out of a resized image: (size, size, 3) uint8."""
    box = (crop.left, crop.top, crop.left + size, crop.top + size)
    pixels = np.asarray(resized.crop(box))
    return np.ascontiguousarray(pixels[:, ::-1]) if crop.flip else pixels.copy()


def _place_random_crop(
    width: int, height: int, config: ViewConfig, *, seed: int, key: str, view: int, name: str
) -> CropRecord:
    # Raw words, not Generator methods: those may change between NumPy versions, and stored teacher
    # features belong to these very crops.
    words = philox_words(seed, "view", key, view)
    size = config.image_size
    short_side = size + _below(words[0], config.greatest_short_side - size + 1)
    resized_width, resized_height = find_resize_sizes(width, height, short_side, name=name)[-1]
    return CropRecord(
        top=_below(words[1], resized_height - size + 1),
        left=_below(words[2], resized_width - size + 1),
        resized_height=resized_height,
        resized_width=resized_width,
        flip=bool(_below(words[3], 2)),
    )


def _below(word: int, bound: int) -> int:
    """Map a uniform 64-bit word to [0, bound); the bias is below bound / 2**64."""
    return (word * bound) >> 64


def _place_ten_crop(
    resized_width: int, resized_height: int, config: ViewConfig, view: int
) -> CropRecord:
    flip, place = divmod(view, _TEN_CROP_PLACES)
    outer = config.ten_crop_side
    rest = outer - config.image_size
    middle = round(rest / 2)  # to even at .5, as torchvision's five_crop
    top, left = [(0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)][place]
    if flip:
        # Places are counted in the mirror image; a crop is recorded in the image itself.
        left = rest - left
    return CropRecord(
        top=(resized_height - outer) // 2 + top,
        left=(resized_width - outer) // 2 + left,
        resized_height=resized_height,
        resized_width=resized_width,
        flip=bool(flip),
    )
