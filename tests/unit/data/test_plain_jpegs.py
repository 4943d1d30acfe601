"""A size that is read without Pillow is the one that Pillow gives, and nothing that it refuses."""

from __future__ import annotations

import io
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from fqgan_dist.data import decoding
from fqgan_dist.data.decoding import JpegHeader, read_jpeg_header
from fqgan_dist.data.plain_jpegs import find_plain_size
from fqgan_dist.errors import DataError

PICTURE = Image.linear_gradient("L").resize((70, 40))


def encode(mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    PICTURE.convert(mode).save(file, "JPEG", **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def read_by_pillow(data: bytes) -> JpegHeader | str | None:
    with mock.patch.object(decoding, "find_plain_size", return_value=None):
        try:
            return read_jpeg_header(data, name="x")
        except DataError as error:
            return str(error)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PLAIN = [
    encode(),
    encode("L"),
    encode(optimize=True),
    encode(subsampling=0, quality=100),
    encode(restart_marker_rows=1),
    encode(comment=b"a comment"),
    encode(icc_profile=PROFILE),
    encode(keep_rgb=True),
    encode(dpi=(300, 300)),
]
OTHER = [
    encode("CMYK"),
    encode(progressive=True),
    encode(exif=turned()),
    encode(xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/' tiff:Orientation='6'/>"),
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
]


@pytest.mark.parametrize("data", PLAIN)
def test_plain_jpegs_are_read(data: bytes) -> None:
    assert find_plain_size(data) == (70, 40)
    assert read_by_pillow(data) == JpegHeader(70, 40, orientation=1)


@pytest.mark.parametrize("data", OTHER)
def test_all_others_are_left_to_pillow(data: bytes) -> None:
    assert find_plain_size(data) is None


@pytest.mark.parametrize("data", [*PLAIN, *OTHER])
def test_cut_anywhere(data: bytes) -> None:
    for end in range(min(len(data), 700)):
        if (size := find_plain_size(data[:end])) is not None:
            assert read_by_pillow(data[:end]) == JpegHeader(*size, orientation=1)


def _segments(data: bytes) -> list[bytes]:
    """Cut what is before the pixels into segments."""
    found, position = [], 2
    while data[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        found.append(data[position:end])
        position = end
    return [*found, data[position:]]


def test_frame_that_is_none_hides_no_other() -> None:
    # Found by the test below: a table of quantizers that is marked as a frame.
    for data in PLAIN:
        changed = data.replace(b"\xff\xdb\x00C", b"\xff\xc0\x00C", 1)
        assert find_plain_size(changed) is None
        assert isinstance(read_by_pillow(changed), str)


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from([part for data in [*PLAIN, *OTHER[:4]] for part in _segments(data)]),
        max_size=12,
    ),
    st.sampled_from(PLAIN),
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=4),
)
def test_whatever_stands_before_the_pixels(
    segments: list[bytes], scan: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(b"\xff\xd8" + b"".join(segments) + _segments(scan)[-1])
    for place, value in changes:
        data[place % len(data)] = value
    if (size := find_plain_size(bytes(data))) is not None:
        assert read_by_pillow(bytes(data)) == JpegHeader(*size, orientation=1)


@settings(max_examples=600)
@given(st.sampled_from(PLAIN), st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255))))
def test_changed_bytes(data: bytes, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    if (size := find_plain_size(bytes(changed))) is not None:
        found = read_by_pillow(bytes(changed))
        limit = decoding.DEFAULT_MAX_PIXELS
        if size[0] * size[1] > limit:
            assert isinstance(found, str)
            assert "pixels" in found
        else:
            assert found == JpegHeader(*size, orientation=1)
