"""Encoded images to views: the one place where images are decoded and cropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.decoding import decode_image
from fqgan_dist.data.fast_views import load_fast_views
from fqgan_dist.data.views import CropRecord, cut, place_view, resize_short_side


def load_view(
    data: bytes, config: ViewConfig, *, seed: int, key: str, view: int, name: str
) -> tuple[np.ndarray, CropRecord]:
    """Decode an image and crop one view of it.

    Args:
        data: the file's bytes: JPEG, PNG or WebP.
        config: the policy, its sizes, and how the pixels are made.
        seed: seed of the run; like `key`, it matters to `random_crop_flip` alone.
        key: the sample's key.
        view: a number that the random crop is drawn for, or the number of the fixed crop.
        name: shard and sample, for errors.

    Returns:
        The crop, (H, W, 3) uint8, and where it was taken from.

    Raises:
        ValueError: the policy has no such view.
        DataError: another format, damaged or truncated data, or too many pixels.
    """
    (loaded,) = load_views(data, config, seed=seed, key=key, views=(view,), name=name)
    return loaded


def load_views(
    data: bytes, config: ViewConfig, *, seed: int, key: str, views: Sequence[int], name: str
) -> list[tuple[np.ndarray, CropRecord]]:
    """Decode an image and crop several views of it, each as `load_view` gives it, to the bit."""
    match config.mode:
        case "reference":
            return _load_reference_views(data, config, seed=seed, key=key, views=views, name=name)
        case "fast":
            return load_fast_views(data, config, seed=seed, key=key, views=views, name=name)


def _load_reference_views(
    data: bytes, config: ViewConfig, *, seed: int, key: str, views: Sequence[int], name: str
) -> list[tuple[np.ndarray, CropRecord]]:
    image = decode_image(data, name=name)
    crops = [
        place_view(image.width, image.height, config, seed=seed, key=key, view=view, name=name)
        for view in views
    ]
    # Ten crops are taken from one resized image.
    resized = {
        side: resize_short_side(image, side, name=name)
        for side in {crop.short_side for crop in crops}
    }
    return [(cut(resized[crop.short_side], crop, config.image_size), crop) for crop in crops]
