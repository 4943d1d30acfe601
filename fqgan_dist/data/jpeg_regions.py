"""Regions of JPEGs, resized while they are decoded: the same pixels in less time.

The compiled part, `jpeg_regions.c`, is built when the package is installed where there are a C
compiler and libjpeg's header, and is not missed otherwise: images are decoded whole then, and
resized by torch. `fqgan doctor` says which it is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import PIL

from fqgan_dist.data.decoding import JpegHeader

_INTERFACE = 1
"""What the compiled part must be: code sent along with a job may be newer than a node's."""


def _import_compiled() -> ModuleType | None:
    try:
        module = importlib.import_module("_fqgan_jpeg_regions")
    except ImportError:
        return None
    return module if module.INTERFACE == _INTERFACE else None


_compiled = _import_compiled()


class ResizedAxis(NamedTuple):
    """How the pixels of one axis of a region are made of those of the image."""

    first: int
    """Pixel of the image that resizing starts at."""
    num_source: int
    """Pixels of the image from there on that the region is made of."""
    scale: float
    """Resized pixels per pixel of the image."""
    num_resized: int
    """Resized pixels to make, for as many as are needed."""
    skipped: int
    """The first of these, which lie before the region."""


def resize_jpeg_region(
    data: bytes,
    header: JpegHeader,
    rows: ResizedAxis,
    columns: ResizedAxis,
    *,
    side: int,
    flip: bool,
    out: np.ndarray,
) -> bool:
    """Decode a square region of an ordinary JPEG, resized.

    Args:
        data: the file's bytes.
        header: what `read_jpeg_header` found.
        rows: how the region's rows are made.
        columns: how its columns are made.
        side: resized pixels per row and column.
        flip: whether it is mirrored, left to right.
        out: (3, side, side) uint8, contiguous; gets the region as it is stored, not turned upright:
            the very pixels that torch makes of `decode_jpeg`'s.

    Returns:
        False where that one has to look: the compiled part is missing, or sees anything unusual or
        damaged, anywhere in the image. What is in `out` has no meaning then.
    """
    library = _find_library()
    return library is not None and library.resize_region(
        data, header.height, header.width, _describe(rows), _describe(columns), side, flip, out
    )


def explain_absence() -> str | None:
    """Say why regions are not decoded alone, and what to do; None if they are."""
    if _compiled is None:
        return (
            "the part that decodes regions of JPEGs is missing, or of another version; install gcc "
            "and libjpeg's header (Debian, Ubuntu: libjpeg-dev), then this package again"
        )
    if _find_library() is None:
        return (
            "no libjpeg-turbo fits the part that decodes regions of JPEGs; install Pillow from "
            "its wheel, which brings one"
        )
    return None


@functools.cache
def _find_library() -> ModuleType | None:
    """Return the compiled part, with a libjpeg-turbo that fits it; None: there is none."""
    if _compiled is None:
        return None
    is_open = any(_compiled.open_library(path) for path in _list_libraries())
    return _compiled if is_open else None


def _list_libraries() -> Iterator[str]:
    """Name the copies of libjpeg-turbo that may be there: Pillow's, then the system's."""
    package = Path(PIL.__file__).parent
    for folder in (package.parent / "pillow.libs", package / ".dylibs"):  # Linux, macOS
        yield from sorted(map(str, folder.glob("libjpeg*")))
    yield from ("libjpeg.so.62", "libjpeg.so.8")


def _describe(axis: ResizedAxis) -> tuple[int, int, float, int, int]:
    first, num_source, scale, num_resized, skipped = axis
    # torch is given the scale, and inverts it again.
    return first, num_source, 1 / scale, num_resized, skipped
