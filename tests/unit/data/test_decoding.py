from __future__ import annotations

import contextlib
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from fqgan_dist.data.decoding import decode_image, read_size, to_float, to_uint8
from fqgan_dist.errors import DataError

PIXELS = photographs.astronaut()[::8, ::8].copy()  # 64 x 64


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, name="shard-000000.tar: sample 'a'")
    assert image.mode == "RGB"
    return np.asarray(image)


def test_lossless_formats_give_the_pixels() -> None:
    image = Image.fromarray(PIXELS)
    assert np.array_equal(decode(encode(image, "PNG")), PIXELS)
    assert np.array_equal(decode(encode(image, "WEBP", lossless=True)), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_of_any_mode_looks_like_the_image(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    found = decode(encode(image, "JPEG", quality=95)).astype(int)
    expected = np.asarray(image.convert("RGB")).astype(int)
    # An inverted CMYK image differs by 100 and more.
    assert np.abs(found - expected).mean() < 6


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA"])
def test_png_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    assert np.array_equal(decode(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_not_blended() -> None:
    image = Image.fromarray(np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)]))
    assert np.array_equal(decode(encode(image, "PNG")), PIXELS)
    palette = Image.fromarray(PIXELS).convert("P")
    data = encode(palette, "PNG", transparency=bytes(range(256)))
    assert np.array_equal(decode(data), np.asarray(palette.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    found = decode(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(found[..., 0], (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = PIXELS[:48]
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(decode(data), upright)


@pytest.mark.parametrize("value", [0, 9, 300])
def test_impossible_orientation_counts_as_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(decode(encode(Image.fromarray(PIXELS), "PNG", exif=exif)), PIXELS)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_image_names_the_sample(image_format: str) -> None:
    data = encode(Image.fromarray(PIXELS), image_format)
    with pytest.raises(DataError, match=r"shard-000000.tar: sample 'a': cannot decode"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff"])
def test_other_bytes_are_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match=f"cannot decode {len(data)} bytes as JPEG / PNG / WEBP"):
        decode(data)


def test_formats_that_are_not_expected_are_refused() -> None:
    # Pillow would open some 40 formats, EPS (a program) among them.
    with pytest.raises(DataError, match="cannot decode"):
        decode(encode(Image.fromarray(PIXELS), "GIF"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 10**6), st.binary(max_size=9))
def test_damaged_bytes_give_an_image_or_a_data_error(
    image_format: str, place: int, noise: bytes
) -> None:
    data = bytearray(encode(Image.fromarray(PIXELS[:16, :16].copy()), image_format))
    start = place % len(data)
    data[start : start + len(noise)] = noise
    with contextlib.suppress(DataError):
        assert decode(bytes(data)).dtype == np.uint8


def test_pixel_limit_holds_before_decoding() -> None:
    data = encode(Image.fromarray(PIXELS), "PNG")
    with pytest.raises(DataError, match="image of 64x64 pixels; expected at most 4095 pixels"):
        decode_image(data, name="a", max_pixels=4095)
    assert decode_image(data, name="a", max_pixels=4096).size == (64, 64)


def test_decompression_bomb_is_a_data_error() -> None:
    # 60000 x 60000 grey pixels in 100 bytes, were it complete: 10 GB as RGB.
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    with pytest.raises(DataError, match="pixels"):
        decode(b"\x89PNG\r\n\x1a\n" + body)


def test_bytes_round_trip_through_the_models_range() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    images = to_float(values)
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(to_uint8(images), values)


def test_to_uint8_truncates_and_clamps() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 128, 255, 255, 255]
    assert to_uint8(torch.tensor([0.0038]))[0] == 128  # 128.48
    assert to_uint8(torch.tensor([0.0079]))[0] == 129  # 129.007


@pytest.mark.data
def test_every_real_photograph_is_decoded(test_data_dir: Path) -> None:
    with tarfile.open(test_data_dir / "imagenet-sample" / "val.tar.gz") as archive:
        members = [member for member in archive if member.name.upper().endswith(".JPEG")]
        assert members
        for member in members:
            file = archive.extractfile(member)
            assert file is not None
            assert decode_image(file.read(), name=member.name).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_of_a_header_is_that_of_the_image(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (5, 9)).save(file, kind, exif=exif)
    size = read_size(file.getvalue(), name="x")
    assert size == decode_image(file.getvalue(), name="x").size
    assert sorted(size) == [5, 9]


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_the_size_of_what_is_no_image_is_an_error(data: bytes):
    with pytest.raises(DataError, match="cannot decode"):
        read_size(data, name="x")
