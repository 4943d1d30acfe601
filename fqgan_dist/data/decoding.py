"""Encoded image bytes to RGB, safely; pixel values to and from the range of the models."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fqgan_dist.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
DEFAULT_MAX_PIXELS = 178_956_970 // 2
"""Pillow's own limit: more pixels than this look like a decompression bomb (268 MB as RGB)."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged data, beside its own OSError and SyntaxError.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode_image(data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WebP to RGB, upright.

    Grey, palette, 16-bit and CMYK images are converted; an alpha channel is dropped, as the
    ImageFolder loader of torchvision does. Unlike there, the EXIF orientation is applied; an
    unreadable EXIF block counts as none.

    Args:
        data: the file's bytes.
        name: shard and sample, for the error.
        max_pixels: limit on width x height, checked before anything is decoded.

    Raises:
        DataError: another format, damaged or truncated data, or too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"{name}: image of {image.width}x{image.height} pixels; "
                    f"expected at most {max_pixels} pixels; remove it or raise the limit"
                )
            image.load()
            return _apply_orientation(_convert_to_rgb(image), _read_orientation(image))
    except _DECODER_ERRORS as error:
        raise DataError(
            f"{name}: cannot decode {len(data)} bytes as {' / '.join(FORMATS)}: {error}; "
            "the sample is damaged: make the dataset again, or remove it"
        ) from error


def to_uint8(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to bytes: clamp(127.5 x + 128, 0, 255), truncated.

    Source: the FQGAN evaluation code; +128 with truncation rounds half up.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1], on their device: (x / 255 - 0.5) / 0.5."""
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        high_bytes = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # Pillow warns where such a palette is converted to RGB directly; the colours are the same.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _read_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    transposition = _TRANSPOSITIONS.get(orientation)
    return image if transposition is None else image.transpose(transposition)
