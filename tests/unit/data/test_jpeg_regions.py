"""Regions of JPEGs decoded alone are the very pixels of whole images, or are left to them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from fqgan_dist.data import fast_views, jpeg_regions
from fqgan_dist.data.config import ViewConfig, ViewPolicy
from fqgan_dist.data.decoding import JpegHeader, read_jpeg_header
from fqgan_dist.data.jpeg_regions import ResizedAxis, explain_absence, resize_jpeg_region
from fqgan_dist.data.view_loading import load_view, load_views
from fqgan_dist.errors import DataError

COFFEE = photographs.coffee()  # (400, 600, 3)


@contextmanager
def without_compiled_part() -> Iterator[None]:
    with mock.patch.object(jpeg_regions, "_find_library", return_value=None):
        yield


def encode(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    options.setdefault("quality", 90)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def load(data: bytes, size: int, view: int, policy: ViewPolicy = "random_crop_flip") -> np.ndarray:
    config = ViewConfig(policy=policy, image_size=size, mode="fast")
    return load_view(data, config, seed=3, key="k", view=view, name="x")[0]


def outcome(data: bytes, size: int, view: int) -> str | bytes:
    try:
        return load(data, size, view).tobytes()
    except DataError as error:
        return str(error)


@contextmanager
def counted_regions() -> Iterator[list[bool]]:
    """Note whether each region that was asked for was made alone."""
    made: list[bool] = []

    def resize(*args: object, **options: object) -> bool:
        is_made = resize_jpeg_region(*args, **options)  # pyright: ignore[reportArgumentType]
        made.append(is_made)
        return is_made

    with mock.patch.object(fast_views, "resize_jpeg_region", resize):
        yield made


@pytest.fixture(autouse=True, scope="module")
def _compiled_part() -> None:
    if (absence := explain_absence()) is not None:
        pytest.skip(absence)


ENCODINGS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "quality 100": {"quality": 100, "subsampling": 0},
    "quality 5": {"quality": 5},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "restarts within rows": {"restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True},
    "optimized": {"optimize": True},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_the_whole_image(encoding: str, mode: str) -> None:
    for width, height in ((600, 400), (333, 397), (600, 263), (271, 400)):
        data = encode(COFFEE[:height, :width], mode, **ENCODINGS[encoding])
        with counted_regions() as made:
            alone = [load(data, 256, view) for view in range(5)]
        assert made == [True] * 5
        with without_compiled_part():
            whole = [load(data, 256, view) for view in range(5)]
        assert np.array_equal(alone, whole)
        assert all(pixels.flags.c_contiguous and pixels.flags.writeable for pixels in alone)


@settings(max_examples=150)
@given(
    st.sampled_from(list(ENCODINGS)),
    st.integers(1, 600),
    st.integers(1, 400),
    st.integers(1, 300),
    st.integers(0, 99),
    st.sampled_from(["random_crop_flip", "center"]),
)
def test_any_size_and_place_give_the_same_pixels(
    encoding: str, width: int, height: int, size: int, view: int, policy: ViewPolicy
) -> None:
    data = encode(COFFEE[:height, :width], **ENCODINGS[encoding])
    view = 0 if policy == "center" else view
    alone = load(data, size, view, policy)
    with without_compiled_part():
        assert np.array_equal(alone, load(data, size, view, policy))


@pytest.mark.parametrize("side", [256, 252, 253])
def test_vector_and_plain_instructions_give_the_same_pixels(side: int) -> None:
    # Columns take plain ones where 4 does not divide the side, rows where 16 does not.
    for view in range(8):
        alone = load(encode(COFFEE), side, view)
        with without_compiled_part():
            assert np.array_equal(alone, load(encode(COFFEE), side, view))


@pytest.mark.data
def test_imagenet_photographs_give_the_same_pixels(test_data_dir: Path) -> None:
    with tarfile.open(test_data_dir / "imagenet-sample" / "val.tar.gz") as archive:
        files = [archive.extractfile(member) for member in archive]
        images = [file.read() for file in files if file is not None]
    images = [data for data in images if data.startswith(b"\xff\xd8")]
    with counted_regions() as made:
        alone = [load(data, 256, number) for number, data in enumerate(images)]
    # The others are turned, or halved first.
    assert sum(made) >= 0.9 * len(images) > 20
    with without_compiled_part():
        for number, (data, pixels) in enumerate(zip(images, alone, strict=True)):
            assert np.array_equal(pixels, load(data, 256, number))


@pytest.mark.parametrize(
    "data",
    [
        encode(COFFEE, exif=(lambda exif: exif.__setitem__(0x0112, 6) or exif)(Image.Exif())),
        encode(COFFEE, "CMYK"),
    ],
)
def test_unusual_images_are_decoded_whole(data: bytes) -> None:
    with counted_regions() as made:
        load(data, 256, 0)
    assert made == []  # nobody even asks


def test_image_that_is_shown_often_is_decoded_once() -> None:
    config = ViewConfig(policy="random_crop_flip", image_size=256, mode="fast")
    with counted_regions() as made:
        load_views(encode(COFFEE), config, seed=3, key="k", views=range(4), name="x")
    assert made == []


@settings(max_examples=200)
@given(st.booleans(), st.integers(0, 10**6), st.binary(max_size=9), st.integers(0, 9))
def test_damage_anywhere_has_the_outcome_of_the_whole_image(
    progressive: bool, place: int, noise: bytes, view: int
) -> None:
    data = bytearray(encode(COFFEE[:150, :200], progressive=progressive))
    start = place % len(data)
    if noise:
        data[start : start + len(noise)] = noise
    else:
        del data[start:]
    alone = outcome(bytes(data), 100, view)
    with without_compiled_part():
        assert alone == outcome(bytes(data), 100, view)


def test_damage_behind_the_region_is_seen() -> None:
    data = encode(COFFEE[:, :200], restart_marker_rows=1)  # upright: two thirds are cut off
    broken = data[: len(data) - 200]
    for view in range(6):
        with counted_regions() as made, pytest.raises(DataError, match="cannot decode"):
            load(broken, 200, view)
        assert made == [False]


def test_header_of_another_image_is_not_taken() -> None:
    rows = ResizedAxis(0, 100, 1.0, 100, 0)
    header = JpegHeader(100, 100, 1)
    out = np.empty((3, 100, 100), np.uint8)
    data = encode(COFFEE)
    assert not resize_jpeg_region(data, header, rows, rows, side=100, flip=False, out=out)


def test_regions_outside_the_image_are_refused() -> None:
    data = encode(COFFEE)
    header = read_jpeg_header(data, name="x")
    assert header is not None
    good = ResizedAxis(0, 400, 1.5, 300, 0)
    out = np.empty((3, 200, 200), np.uint8)
    for bad in (
        good._replace(first=-1),
        good._replace(first=1),
        good._replace(first=2**62),
        good._replace(num_source=0),
        good._replace(num_source=10),  # fewer than its pixels need
        good._replace(num_source=2**62),
        good._replace(scale=1e-9),
        good._replace(scale=float("nan")),
        good._replace(skipped=101),
        good._replace(skipped=-1),
        good._replace(num_resized=2**40),
    ):
        with pytest.raises(ValueError, match="outside the image"):
            resize_jpeg_region(data, header, bad, good, side=200, flip=False, out=out)


@pytest.mark.parametrize("side", [0, -4, 2**20])
def test_side_that_is_none_is_refused(side: int) -> None:
    assert jpeg_regions._compiled is not None
    axis = (0, 400, 1.0, 400, 0)
    with pytest.raises(ValueError, match="outside the image"):
        jpeg_regions._compiled.resize_region(
            encode(COFFEE), 400, 600, axis, axis, side, False, bytearray(12)
        )


def test_absence_is_explained() -> None:
    with mock.patch.object(jpeg_regions, "_compiled", None):
        assert "libjpeg-dev" in (explain_absence() or "")
    with without_compiled_part():
        assert "Pillow" in (explain_absence() or "")


def test_library_that_does_not_fit_is_not_used() -> None:
    assert jpeg_regions._compiled is not None
    for name in ("/nonexistent.so", "libc.so.6", "not\ud800encodable"):
        try:
            assert not jpeg_regions._compiled.open_library(name)
        except UnicodeEncodeError:
            assert "\ud800" in name
    # The one that was in use still is.
    load(encode(COFFEE), 256, 0)
