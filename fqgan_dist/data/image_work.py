"""How much work the bytes of an image ask of a decoder, counted before it is given them.

Pixels alone do not bound it: a progressive JPEG of 187 kB may have its last scan 3,000 times, each
a pass over all its blocks. Nothing here is timed: the same bytes are taken or refused everywhere.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

USUAL_SCANS = 10
"""Scans of libjpeg's own script for progressive colour images."""
MAX_SCANS = 500
"""Scans of any JPEG; the limit that libjpeg-turbo's own tests of hostile files set."""
MAX_SEGMENTS = 1024
"""Segments before the first scan of a JPEG. A camera's depth map takes some hundreds."""
MAX_EXIF_SEGMENTS = 16
"""Those of EXIF among them: Pillow joins them one by one, which is quadratic."""
MAX_CHUNKS = 65_536
"""Chunks of a PNG or WebP; libpng cuts pixels into 8 KiB, 33,000 of them for the largest image."""
WEBP_PIXELS_SHARE = 3
"""A WebP may have this part of the pixels of others: its decoder holds 20 bytes of each."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What pixels are made of; all other chunks are left out, but for a transparency and an orientation
# that are whole and small. Pillow finds an orientation in two texts, too.
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_PNG_EXTRAS = frozenset({b"tRNS", b"eXIf"})
_MAX_EXTRA_BYTES = 65_536
_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ORIENTATION_KEYWORDS = frozenset({b"XML:com.adobe.xmp", b"Raw profile type exif"})
_MAX_KEYWORD_BYTES = 79
_MAX_TEXT_BYTES = 2**20
_JPEG_START = b"\xff\xd8\xff"
_START_OF_SCAN, _END_OF_IMAGE, _EXIF_SEGMENT = 0xDA, 0xD9, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_FIRST_WITH_LENGTH, _START_OF_IMAGE = 0xC0, 0xD8
# Not a stuffed byte, a restart within a scan, or a fill byte.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def keep_pixels(data: bytes) -> bytes:
    """Give what a decoder needs: of a PNG the chunks of its pixels and orientation, all of others.

    Other texts, profiles and the like, which may be damaged or unpack to gigabytes, change no
    pixel.

    Raises:
        ValueError: there are too many chunks.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept, end = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    texts: dict[bytes, bytes] = {}
    for kind, start, end in _png_chunks(data):
        is_extra = kind in _PNG_EXTRAS and end - start <= _MAX_EXTRA_BYTES
        if kind in _PNG_PIXELS or (is_extra and _has_right_checksum(data, start, end)):
            kept.append(data[start:end])
        elif kind in _PNG_TEXTS:
            # Up to the limit of Pillow, which takes the last of a keyword and refuses an image with
            # 64 MiB of texts.
            keyword = data[start + 8 : start + 9 + _MAX_KEYWORD_BYTES].partition(b"\0")[0]
            if keyword in _ORIENTATION_KEYWORDS and _is_whole_text(data, kind, start, end):
                texts[keyword] = data[start:end]
    kept.append(data[end:])  # what is no chunk: the decoder's matter
    return b"".join([*kept[:2], *texts.values(), *kept[2:]])  # behind the header, IHDR


def count_passes(data: bytes) -> int:
    """Count the passes over an image's pixels, before anything else looks at its bytes.

    Returns:
        The scans of a JPEG; 1 for others.

    Raises:
        ValueError: it has too many segments or chunks.
    """
    if data.startswith(_JPEG_START):
        return count_scans(data)
    if data.startswith(b"RIFF"):
        _count_webp_chunks(data)
    return 1


def check_work(data: bytes, passes: int, width: int, height: int, *, max_pixels: int) -> None:
    """Compare what an image of a size would take to decode with the most that is allowed.

    Args:
        data: the file's bytes.
        passes: what `count_passes` found.
        width: pixels per row.
        height: rows.
        max_pixels: limit on pixels for one pass.

    Raises:
        ValueError: it is more.
    """
    pixels = width * height
    # As much as the largest image that is allowed, with the scans that such a one has.
    if passes > MAX_SCANS or passes * pixels > USUAL_SCANS * max_pixels:
        raise ValueError(f"{passes} scans of {pixels} pixels are more work than any photograph")
    if data.startswith(b"RIFF") and pixels * WEBP_PIXELS_SHARE > max_pixels:
        raise ValueError(
            f"{pixels} pixels; a WebP may have {max_pixels // WEBP_PIXELS_SHARE} of them"
        )


def count_scans(data: bytes) -> int:
    """Count the passes over the pixels of a JPEG, up to the end of its first image.

    Raises:
        ValueError: it has too many segments.
    """
    scans = segments = exif_segments = components = 0
    position, is_progressive = 2, False
    while marker := _MARKER.search(data, position):
        kind, position = data[marker.end() - 1], marker.end()
        if kind == _END_OF_IMAGE:
            break
        # Those below are not followed by a length: where libjpeg has lost a restart marker it steps
        # over the two bytes alone, and finds the scans that a length would hide here.
        if kind < _FIRST_WITH_LENGTH or kind == _START_OF_IMAGE:
            continue
        length = int.from_bytes(data[position : position + 2])
        if kind == _START_OF_SCAN:
            scans += 1
            if not is_progressive and data[position + 2 : position + 3] == bytes([components]):
                return 1  # all there is, so the pixels' bytes need no look: the usual case
        elif kind in _FRAMES:
            is_progressive = kind in _PROGRESSIVE_FRAMES
            components = data[position + 7] if position + 7 < len(data) else 0
        segments += 1
        exif_segments += kind == _EXIF_SEGMENT and data.startswith(b"Exif", position + 2)
        if segments > MAX_SEGMENTS + 2 * scans or exif_segments > MAX_EXIF_SEGMENTS:
            raise ValueError(f"{segments} segments ({exif_segments} of EXIF) are no photograph's")
        position += length
    return scans


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, begin and end of each whole chunk, up to the last."""
    position = len(_PNG_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        if end > len(data) or not kind.isalpha():
            return
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end
    raise ValueError(f"more than {MAX_CHUNKS} chunks are no photograph's")


def _has_right_checksum(data: bytes, start: int, end: int) -> bool:
    return zlib.crc32(memoryview(data)[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def _is_whole_text(data: bytes, kind: bytes, start: int, end: int) -> bool:
    """Whether a text chunk is undamaged and, unpacked, as small as Pillow allows."""
    if end - start > _MAX_TEXT_BYTES or not _has_right_checksum(data, start, end):
        return False
    rest = data[start + 8 : end - 4].partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return True
    # Compression method, then the data, in iTXt behind a flag and before it two more names.
    method, packed = rest[:1], rest[1:]
    if kind == b"iTXt":
        method, packed = rest[1:2], rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, _MAX_TEXT_BYTES)
    except zlib.error:
        return False
    return method == b"\0" and not unpacker.unconsumed_tail


def _count_webp_chunks(data: bytes) -> None:
    position = 12
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
    raise ValueError(f"more than {MAX_CHUNKS} chunks are no photograph's")
