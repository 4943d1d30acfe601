"""Encoded images to views: the one place where images are decoded and cropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.decode_limit import limit_decoding
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.fast_views import PlaceViews, load_fast_views
from fqgan_dist.data.views import CropRecord, cut, place_view, resize_short_side


def load_view(
    data: bytes,
    config: ViewConfig,
    *,
    seed: int,
    key: str,
    view: int,
    name: str,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, CropRecord]:
    """Decode an image and crop one view of it.

    Args:
        data: the file's bytes: JPEG, PNG or WebP.
        config: the policy, its sizes, and how the pixels are made.
        seed: seed of the run; like `key`, it matters to `random_crop_flip` alone.
        key: the sample's key.
        view: a number that the random crop is drawn for, or the number of the fixed crop.
        name: shard and sample, for errors.
        out: (3, H, W) uint8, contiguous: where the crop is written, as far as it goes if there is
            an error; None: to new memory.

    Returns:
        The crop, (3, H, W) uint8, and where it was taken from.

    Raises:
        ValueError: the policy has no such view.
        DataError: another format, damaged or truncated data, or too many pixels.
    """
    places = None if out is None else out[None]
    (loaded,) = load_views(data, config, seed=seed, key=key, views=(view,), name=name, out=places)
    return loaded


def load_views(
    data: bytes,
    config: ViewConfig,
    *,
    seed: int,
    key: str,
    views: Sequence[int],
    name: str,
    out: np.ndarray | None = None,
) -> list[tuple[np.ndarray, CropRecord]]:
    """Decode an image and crop several views of it, each as `load_view` gives it, to the bit.

    `out` is (views, 3, H, W) here.
    """
    if out is None:
        out = np.empty((len(views), *config.shape), np.uint8)

    def place(width: int, height: int) -> list[CropRecord]:
        return [
            place_view(width, height, config, seed=seed, key=key, view=view, name=name)
            for view in views
        ]

    load = _load_reference_views if config.mode == "reference" else load_fast_views
    with limit_decoding(name):
        crops = load(data, config, place, name=name, out=out)
    return list(zip(out, crops, strict=True))


def _load_reference_views(
    data: bytes, config: ViewConfig, place: PlaceViews, *, name: str, out: np.ndarray
) -> list[CropRecord]:
    image = decode_image(data, name=name)
    crops = place(image.width, image.height)
    # Ten crops are taken from one resized image.
    resized = {
        side: resize_short_side(image, side, name=name)
        for side in {crop.short_side for crop in crops}
    }
    for pixels, crop in zip(out, crops, strict=True):
        pixels[...] = cut(resized[crop.short_side], crop, config.image_size).transpose(2, 0, 1)
    return crops
