"""Encoded image bytes to RGB, safely; pixel values to and from the range of the models."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fqgan_dist.data.decode_limit import limit_decoding
from fqgan_dist.data.image_work import check_work, count_passes, keep_pixels
from fqgan_dist.data.plain_jpegs import find_plain_size
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
_TRANSPOSED = (5, 6, 7, 8)
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

# Of damaged metadata Pillow warns without naming the image, and the pixels are whole.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


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
    with limit_decoding(name), _open_image(data, name=name, max_pixels=max_pixels) as image:
        image.load()
        return _apply_orientation(_convert_to_rgb(image), _read_orientation(image))


class JpegHeader(NamedTuple):
    """What is known of an ordinary JPEG before its pixels are decoded."""

    width: int
    """Width of the stored image, before its orientation is applied."""
    height: int
    """Height of the stored image."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 where there is none, or none that counts."""


def read_jpeg_header(
    data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS
) -> JpegHeader | None:
    """Read the header of a colour or grey JPEG; None for everything else that Pillow opens.

    Raises:
        DataError: as `decode_image`, as far as the header tells.
    """
    size = find_plain_size(data)
    if size is not None and size[0] * size[1] <= max_pixels:
        return JpegHeader(*size, orientation=1)
    with _open_image(data, name=name, max_pixels=max_pixels) as image:
        # A JPEG with further images behind it, from some cameras, is an MPO to Pillow.
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            return None
        orientation = _read_orientation(image)
        is_known = orientation in _TRANSPOSITIONS
        return JpegHeader(image.width, image.height, orientation if is_known else 1)


def read_size(data: bytes, *, name: str) -> tuple[int, int]:
    """Read the width and height that `decode_image` would give, from the header alone.

    Raises:
        DataError: as `decode_image`, as far as the header tells.
    """
    with _open_image(data, name=name, max_pixels=DEFAULT_MAX_PIXELS) as image:
        width, height = image.size
        return (height, width) if _read_orientation(image) in _TRANSPOSED else (width, height)


def decode_jpeg(data: bytes, header: JpegHeader, *, reduction: int = 1) -> np.ndarray | None:
    """Decode an ordinary JPEG faster than Pillow, at a fraction of its size if asked to.

    Without reduction the pixels are those of `decode_image`, before orientation.

    Args:
        data: the file's bytes.
        header: what `read_jpeg_header` found.
        reduction: 1, 2, 4 or 8: each pixel is the mean of a square of that side, or close to it
            (the lowest frequencies of each block of the cosine transform).

    Returns:
        The stored image, (ceil(height / reduction), ceil(width / reduction), 3) uint8; None where
        this decoder sees anything unusual: `decode_image` has the last word then, so that both
        refuse the same images.
    """
    # simplejpeg is the fastest of the well-kept decoders that come as wheels: ms per image of one
    # core, least of five interleaved runs, 100 ImageNet originals (475x393, 111 KB) / the same at
    # short side 320 and quality 90: simplejpeg 1.9 1.25 / 0.54, opencv 5.0 1.48 / 0.62, torchvision
    # 0.29 1.56 / 0.63, Pillow 13 1.47 / 0.66 and 0.1 more for an array. Its `fastdct` and
    # `fastupsample` gain nothing that can be measured. PyTurboJPEG needs a library of the system.
    height, width = -(-header.height // reduction), -(-header.width // reduction)
    try:
        # This parser's own size: a file must not show a small image to one and a bomb to the other.
        stored_height, stored_width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if (stored_height, stored_width) != (header.height, header.width):
            return None
        if colors not in ("YCbCr", "RGB", "Gray"):
            return None
        # `strict`: what is merely a warning to libjpeg (a premature end!) counts.
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            min_height=height if reduction > 1 else 0,
            min_width=width if reduction > 1 else 0,
            min_factor=reduction,
            strict=True,
        )
    except (ValueError, RuntimeError, MemoryError):
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def to_uint8(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to bytes: clamp(127.5 x + 128, 0, 255), truncated.

    Source: the FQGAN evaluation code; +128 with truncation rounds half up.
    """
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1], on their device: (x / 255 - 0.5) / 0.5."""
    return (images.to(torch.float32) / 255 - 0.5) / 0.5


@contextmanager
def _open_image(data: bytes, *, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image and check its size; whatever goes wrong, inside too, is a DataError."""
    try:
        # First of all: Pillow's reading of a header may be quadratic.
        passes = count_passes(data)
        with Image.open(io.BytesIO(keep_pixels(data)), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"{name}: image of {image.width}x{image.height} pixels; "
                    f"expected at most {max_pixels} pixels; remove it or raise the limit"
                )
            check_work(data, passes, image.width, image.height, max_pixels=max_pixels)
            yield image
    except _DECODER_ERRORS as error:
        # Pillow's own words for this are the address of the buffer.
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "they are none of these, or the header is damaged" if is_unknown else error
        raise DataError(
            f"{name}: cannot decode {len(data)} bytes as {' / '.join(FORMATS)}: {reason}; "
            "the sample is damaged: make the dataset again, or remove it"
        ) from error


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        high_bytes = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
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
