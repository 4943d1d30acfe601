"""Images that keep a decoder busy are refused by count; chunks without pixels do not matter."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.decoding import decode_image, read_jpeg_header, read_size
from fqgan_dist.data.image_work import (
    MAX_CHUNKS,
    MAX_EXIF_SEGMENTS,
    MAX_SCANS,
    MAX_SEGMENTS,
    count_scans,
    keep_pixels,
)
from fqgan_dist.data.view_loading import load_view
from fqgan_dist.errors import DataError


def picture(width: int = 48, height: int = 40) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    values = np.stack([rows * 5, columns * 5, rows + columns], -1)
    return Image.fromarray((values % 256).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, *, flaw: int = 0) -> bytes:
    checksum = zlib.crc32(kind + data) ^ flaw
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(png: bytes, extra: bytes) -> bytes:
    """Put a chunk behind a PNG's header."""
    return png[:33] + extra + png[33:]


def segment(kind: int, data: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data


def repeat_last_scan(jpeg: bytes, times: int) -> bytes:
    start, end = jpeg.rfind(b"\xff\xda"), jpeg.rfind(b"\xff\xd9")
    return jpeg[:start] + jpeg[start:end] * times + jpeg[end:]


PNG = encode(picture(), "PNG")
JPEG = encode(picture(), "JPEG", quality=95)
PROGRESSIVE = encode(picture(), "JPEG", progressive=True)
TEXT = b"Comment\0\0" + zlib.compress(bytes(3_000_000))
DEEP = Image.new("I;16", (48, 40), 30_000)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", TEXT),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(3_000_000))),
        b"".join(chunk(b"zTXt", TEXT) for _ in range(70)),
        chunk(b"tEXt", b"Comment\0hello", flaw=1),
        chunk(b"eXIf", b"no EXIF", flaw=1),
        chunk(b"tRNS", b"\0\1", flaw=1),
        chunk(b"gAMA", b"\0"),
        chunk(b"pHYs", b""),
    ],
    ids=["text", "profile", "many texts", "bad text", "bad EXIF", "bad tRNS", "gamma", "size"],
)
def test_chunks_that_hold_no_pixels_do_not_matter(extra: bytes) -> None:
    odd = with_chunk(PNG, extra)
    assert decode_image(odd, name="x").tobytes() == picture().tobytes()
    assert read_size(odd, name="x") == (48, 40)
    view = ViewConfig(policy="center", image_size=32, mode="fast")
    for data in (PNG, odd):
        load_view(data, view, seed=0, key="x", view=0, name="x")


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
def test_damaged_chunks_that_pixels_depend_on_are_refused(kind: bytes) -> None:
    data = bytearray(encode(picture().quantize(16), "PNG"))
    at = data.find(kind)
    data[at + 4 + struct.unpack(">I", data[at - 4 : at])[0]] ^= 0xFF
    with pytest.raises(DataError, match="cannot decode"):
        decode_image(bytes(data), name="x")


@pytest.mark.parametrize(
    "image",
    [picture(), picture().quantize(16), picture().convert("1"), picture().convert("LA"), DEEP],
    ids=["RGB", "palette", "bilevel", "alpha", "16 bits"],
)
def test_what_is_kept_of_a_png_decodes_to_the_same(image: Image.Image) -> None:
    transparency = {"transparency": 0} if image.mode == "P" else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, "PNG", exif=exif, dpi=(72, 72), **transparency)
    kept = keep_pixels(data)
    assert len(kept) < len(data)
    with Image.open(io.BytesIO(data)) as whole, Image.open(io.BytesIO(kept)) as part:
        assert whole.convert("RGBA").tobytes() == part.convert("RGBA").tobytes()
    assert decode_image(data, name="x").size == image.size[::-1]  # the orientation is kept


ORIENTATION = "<x:xmpmeta><rdf tiff:Orientation='6'/>".replace("'", '"')
EXIF = Image.Exif()
EXIF[0x0112] = 6
RAW = EXIF.tobytes()
PROFILE = f"\nexif\n{len(RAW):8d}\n{RAW.hex()}\n"


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", ["XMP", "profile"])
def test_an_orientation_in_a_text_of_a_png_is_applied(kind: str, *, is_packed: bool) -> None:
    texts = PngInfo()
    if kind == "XMP":
        texts.add_itxt("XML:com.adobe.xmp", ORIENTATION, zip=is_packed)
    else:
        texts.add_text("Raw profile type exif", PROFILE, zip=is_packed)
    data = encode(picture(), "PNG", pnginfo=texts)
    assert read_size(data, name="x") == (40, 48)
    turned = picture().transpose(Image.Transpose.ROTATE_270)
    assert decode_image(data, name="x").tobytes() == turned.tobytes()


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"zTXt", b"Raw profile type exif\0\1" + zlib.compress(b"")),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + ORIENTATION.encode(), flaw=1),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(900_000)) * 80,
        chunk(b"zTXt", b"Raw profile type exif"),
    ],
    ids=["bomb", "method", "XMP bomb", "checksum", "many", "cut"],
)
def test_a_text_with_an_orientation_that_is_large_or_damaged_does_not_matter(extra: bytes) -> None:
    data = with_chunk(PNG, extra)
    assert decode_image(data, name="x").tobytes() == picture().tobytes()


def test_a_cut_or_continued_png_is_given_to_the_decoder_as_it_is() -> None:
    for end in (20, 33, 40, len(PNG) - 20, len(PNG) - 5):
        assert keep_pixels(PNG[:end]) == PNG[:end]
    assert keep_pixels(PNG + b"behind") == PNG + b"behind"


def test_scans_are_counted_up_to_the_end_of_the_first_image() -> None:
    assert count_scans(JPEG) == 1
    assert count_scans(PROGRESSIVE) == 10
    assert count_scans(PROGRESSIVE + PROGRESSIVE) == 10
    # A comment between scans may look like an end, or like more scans.
    start = PROGRESSIVE.rfind(b"\xff\xda")
    for text in (b"\xff\xd9", b"\xff\xda" * 1000):
        assert count_scans(PROGRESSIVE[:start] + segment(0xFE, text) + PROGRESSIVE[start:]) == 10


def test_scans_of_single_components_are_counted_too() -> None:
    # A baseline JPEG whose components come one by one may repeat them as well.
    data = JPEG.replace(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x08\x01", 1)
    assert count_scans(repeat_last_scan(data, 30)) == 30


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(mode: Any) -> None:
    data = repeat_last_scan(encode(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True), 300)
    view = ViewConfig(policy="center", image_size=32, mode=mode)
    with pytest.raises(DataError, match="309 scans of 16000000 pixels are more work"):
        load_view(data, view, seed=0, key="x", view=0, name="x")
    with pytest.raises(DataError, match="309 scans"):
        read_size(data, name="x")
    small = repeat_last_scan(PROGRESSIVE, MAX_SCANS)
    with pytest.raises(DataError, match=f"{MAX_SCANS + 9} scans"):
        read_jpeg_header(small, name="x")


@pytest.mark.parametrize("kind", [0x01, 0x02, 0xBF])
def test_scans_behind_a_marker_that_libjpeg_steps_over_are_counted(kind: int) -> None:
    start, end = PROGRESSIVE.rfind(b"\xff\xda"), PROGRESSIVE.rfind(b"\xff\xd9")
    length = struct.unpack(">H", PROGRESSIVE[start + 2 : start + 4])[0]
    scan = PROGRESSIVE[start : start + 2 + length]
    # Restarts are announced and do not come: libjpeg looks for them in what follows.
    restart = segment(0xDD, struct.pack(">H", 1))
    hidden = segment(kind, scan * 100)
    data = PROGRESSIVE[:start] + restart + scan + hidden + PROGRESSIVE[end:]
    assert decode_image(data, name="x").size == (48, 40)
    assert count_scans(data) == 110


def test_a_progressive_jpeg_with_many_scans_that_are_little_work_is_taken() -> None:
    data = repeat_last_scan(PROGRESSIVE, 50)
    assert decode_image(data, name="x").size == (48, 40)


def test_a_jpeg_of_very_many_segments_is_refused_before_pillow_joins_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(Image, "open", opened.append)
    odd = JPEG[:2] + segment(0xE1, b"Exif\0\0") * (MAX_EXIF_SEGMENTS + 1) + JPEG[2:]
    with pytest.raises(DataError, match="segments"):
        read_size(odd, name="x")
    assert not opened


@pytest.mark.parametrize(
    ("kind", "data", "count"),
    [(0xFE, b"comment", MAX_SEGMENTS + 1), (0xE1, b"Exif\0\0II", MAX_EXIF_SEGMENTS + 1)],
)
def test_a_jpeg_of_very_many_segments_is_refused(kind: int, data: bytes, count: int) -> None:
    odd = JPEG[:2] + segment(kind, data) * count + JPEG[2:]
    with pytest.raises(DataError, match="segments"):
        decode_image(odd, name="x")


def test_a_png_of_very_many_chunks_is_refused() -> None:
    odd = with_chunk(PNG, chunk(b"tEXt", b"") * MAX_CHUNKS)
    with pytest.raises(DataError, match="chunks"):
        decode_image(odd, name="x")


def test_a_webp_may_have_fewer_pixels_as_its_decoder_needs_more_of_everything() -> None:
    data = encode(picture(600, 400), "WEBP", lossless=True)
    assert decode_image(data, name="x", max_pixels=3 * 600 * 400).size == (600, 400)
    with pytest.raises(DataError, match="a WebP may have 239999 of them"):
        decode_image(data, name="x", max_pixels=3 * 600 * 400 - 3)
    frames = [picture(), picture().rotate(90)]
    animated = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(animated, name="x").tobytes() == picture().tobytes()
    odd = animated + (b"ANMF" + bytes(4)) * MAX_CHUNKS
    with pytest.raises(DataError, match="chunks"):
        decode_image(odd, name="x")
