from __future__ import annotations

import functools
import io
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from fqgan_dist.data.config import ViewConfig, ViewMode, ViewPolicy
from fqgan_dist.data.decoding import decode_image, decode_jpeg, read_jpeg_header
from fqgan_dist.data.view_loading import load_view, load_views
from fqgan_dist.data.views import CropRecord, apply_view, find_resize_sizes, num_views
from fqgan_dist.errors import DataError

POLICIES: tuple[ViewPolicy, ...] = ("random_crop_flip", "ten_crop", "center")
Loaded = list[tuple[np.ndarray, CropRecord]]


@functools.cache
def photograph(name: str) -> Image.Image:
    return Image.fromarray(
        {
            "astronaut": photographs.astronaut()[:400],  # 512 x 400
            "chelsea": photographs.chelsea(),  # 451 x 300
            "coffee": photographs.coffee().transpose(1, 0, 2).copy(),  # 400 x 600
            "rocket": photographs.rocket()[1:, 1:].copy(),  # 639 x 426
        }[name]
    )


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


def encode(image: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    if image_format == "JPEG":
        options.setdefault("quality", 90)
    image.save(file, image_format, **options)  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def make_waves(width: int, height: int, period: int = 12) -> Image.Image:
    """Waves along both axes: a shift by 1/48 of a period changes values by up to 13."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    waves = [rows, columns, rows + columns]
    values = [128 + 100 * np.sin(2 * np.pi * wave / period) for wave in waves]
    return Image.fromarray(np.stack(values, axis=-1).round().astype(np.uint8))


def load(
    data: bytes,
    mode: ViewMode,
    *,
    policy: ViewPolicy = "random_crop_flip",
    size: int = 256,
    views: tuple[int, ...] = (0,),
    key: str = "k",
) -> Loaded:
    config = ViewConfig(policy=policy, image_size=size, mode=mode)
    return load_views(data, config, seed=3, key=key, views=views, name="shard.tar: sample 'a'")


def compare(data: bytes, *, size: int = 256, view: int = 0, key: str = "k") -> np.ndarray:
    """Load a random crop in both modes, compare where they lie, and give the pixels' difference."""
    ((exact, exact_crop),) = load(data, "reference", size=size, views=(view,), key=key)
    ((fast, fast_crop),) = load(data, "fast", size=size, views=(view,), key=key)
    assert fast_crop == exact_crop
    assert fast.shape == exact.shape
    assert fast.dtype == exact.dtype == np.uint8
    return fast.astype(int) - exact


def outcome(data: bytes, mode: ViewMode) -> str:
    try:
        load(data, mode, size=32)
    except DataError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("policy", POLICIES)
def test_reference_mode_is_decoding_and_cropping(policy: ViewPolicy) -> None:
    data = encode(photograph("chelsea"))
    config = ViewConfig(policy=policy, image_size=64)
    assert config.mode == "reference"
    for view in range(num_views(policy) or 4):
        pixels, crop = load_view(data, config, seed=5, key="a", view=view, name="a")
        image = decode_image(data, name="a")
        expected, expected_crop = apply_view(image, config, seed=5, key="a", view=view)
        assert crop == expected_crop
        assert np.array_equal(pixels, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["reference", "fast"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [40, 200])
def test_views_loaded_together_are_those_loaded_alone(
    mode: ViewMode, policy: ViewPolicy, size: int
) -> None:
    # Stored features and codes belong to the very pixels that training loads one by one.
    data = encode(photograph("rocket"))
    views = tuple(range(num_views(policy) or 6))
    together = load(data, mode, policy=policy, size=size, views=views)
    for view, (pixels, crop) in zip(views, together, strict=True):
        ((alone, alone_crop),) = load(data, mode, policy=policy, size=size, views=(view,))
        assert crop == alone_crop
        assert np.array_equal(pixels, alone)


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_each_view_has_memory_of_its_own(mode: ViewMode) -> None:
    data = encode(photograph("chelsea"))
    loaded = load(data, mode, policy="ten_crop", size=64, views=(0, 4, 5))
    expected = [pixels.copy() for pixels, _ in loaded]
    for (pixels, _), before in zip(loaded, expected, strict=True):
        assert pixels.flags.c_contiguous
        assert np.array_equal(pixels, before)
        pixels[:] = 0


@settings(max_examples=60)
@given(
    st.sampled_from(POLICIES),
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 24),
    st.integers(0, 9),
    st.integers(1, 8),
)
def test_fast_views_lie_where_the_reference_puts_them(
    policy: ViewPolicy,
    image_format: str,
    width: int,
    height: int,
    size: int,
    view: int,
    orientation: int,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(make_waves(width, height), image_format, exif=exif)
    view %= num_views(policy) or 10
    ((exact, exact_crop),) = load(data, "reference", policy=policy, size=size, views=(view,))
    ((fast, fast_crop),) = load(data, "fast", policy=policy, size=size, views=(view,))
    assert fast_crop == exact_crop
    assert fast.shape == exact.shape == (3, size, size)
    assert fast.dtype == np.uint8
    assert fast.flags.c_contiguous
    assert fast.flags.writeable


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_fast_views_show_the_same_place_to_a_fraction_of_a_pixel(
    orientation: int, image_format: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {}
    data = encode(make_waves(341, 277), image_format, exif=exif, **options)
    for view in range(4):
        # 0.8 by the tolerance of 1/64 pixel along each axis, 2 by rounding.
        assert np.abs(compare(data, size=173, view=view)).max() <= 4


@settings(max_examples=60)
@given(st.integers(60, 200), st.integers(60, 200), st.integers(50, 220), st.integers(0, 99))
def test_any_scale_shows_the_same_place(width: int, height: int, size: int, view: int) -> None:
    assume(min(width, height) < 2 * size)  # nothing is halved
    data = encode(make_waves(width, height), "PNG", compress_level=1)
    assert np.abs(compare(data, size=size, view=view)).max() <= 4


def test_scales_near_one_show_the_same_place() -> None:
    # As many pixels of an axis are made as there are, now and then.
    data = encode(make_waves(500, 308), "PNG", compress_level=1)
    for view in range(60):
        assert np.abs(compare(data, view=view)).max() <= 4


@pytest.mark.parametrize(("size", "reduction"), [(150, 2), (70, 4), (30, 8)])
@pytest.mark.parametrize("orientation", [1, 7])
def test_reduced_views_show_the_same_place(size: int, reduction: int, orientation: int) -> None:
    # Neither side is a multiple of the reduction: the last decoded pixels lie half outside.
    image = make_waves(617, 453, period=24 * reduction)
    assert len(find_resize_sizes(453, 617, size, name="a")) - 1 == np.log2(reduction)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, quality=100, subsampling=0, exif=exif)
    for view in range(6):
        # The reference's BOX filter takes whole pixels: on odd sides it displaces what it averages
        # by up to half a pixel, hence 1.5 to 2.8. Taking the rounded size for the image's gives 5.
        assert np.abs(compare(data, size=size, view=view)).mean() < 4


def test_fast_ten_crops_are_cut_from_one_image_as_the_reference_does() -> None:
    data = encode(make_waves(431, 387))
    (first, _), (last, _), (mirrored, _) = load(
        data, "fast", policy="ten_crop", size=300, views=(0, 3, 6)
    )
    # 30 pixels apart along both axes; view 6 mirrors the crop at the top left.
    assert np.array_equal(first[:, 30:, 30:], last[:, :-30, :-30])
    assert np.array_equal(mirrored, first[:, :, ::-1])


@pytest.mark.parametrize("size", [20, 45, 90, 180, 700])
@pytest.mark.parametrize("orientation", [1, 6])
def test_photographs_look_the_same_at_any_scale(size: int, orientation: int) -> None:
    # From 1/16 (halved by the reference four times, by the JPEG decoder thrice) to 2.3 times.
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in PHOTOGRAPHS:
        difference = compare(encode(photograph(name), exif=exif), size=size, view=size)
        is_halved = min(photograph(name).size) >= 2 * size
        assert np.abs(difference).mean() < (6 if is_halved else 0.5)
        # The reference's BOX filter rounds half up twice a halving: 0.5 brighter each time.
        assert -3 < difference.mean() < 1


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_difference_from_the_reference_has_its_documented_distribution(name: str) -> None:
    data = encode(photograph(name))
    assert min(photograph(name).size) < 2 * 220  # nothing is halved
    differences = np.stack([compare(data, size=220, view=view) for view in range(12)])
    sizes = np.abs(differences)
    assert sizes.mean() < 0.2
    assert np.percentile(sizes, 99) <= 2
    assert np.percentile(sizes, 99.9) <= 3
    assert sizes.max() <= 12
    assert abs(differences.mean()) < 0.03


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_tiny_image_is_reduced_too(reduction: int) -> None:
    rows, columns = np.mgrid[: 2 * reduction, : 2 * reduction]
    values = np.stack([rows, columns, rows + columns], axis=-1) * (60 / reduction)
    data = encode(Image.fromarray(values.astype(np.uint8)), quality=100, subsampling=0)
    assert np.abs(compare(data, size=2)).mean() < 3


def measure_peak_bytes(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_large_photograph_is_never_decoded_whole() -> None:
    data = encode(Image.new("RGB", (4096, 3072), (200, 90, 10)))
    peak = measure_peak_bytes(lambda: load(data, "fast", size=256))
    assert peak < 4096 * 3072 * 3 / 8 / 8 * 4 + 5e6  # 38 MB whole


def test_file_that_shows_two_sizes_is_not_decoded() -> None:
    data = encode(Image.new("RGB", (4096, 3072)))
    header = read_jpeg_header(encode(Image.new("RGB", (16, 16))), name="a")
    assert header is not None
    assert measure_peak_bytes(lambda: decode_jpeg(data, header)) < 1e6  # 38 MB whole


def test_fast_mode_is_not_the_reference() -> None:
    # Otherwise the tests above compare nothing.
    assert np.abs(compare(encode(photograph("astronaut")), size=190)).max() > 0


@pytest.mark.parametrize(
    ("mode", "image_format", "options"),
    [
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("RGB", "JPEG", {"subsampling": 1}),
        ("RGB", "JPEG", {"restart_marker_rows": 1}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "JPEG", {}),
        ("L", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("RGB", "MPO", {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
)
def test_every_kind_of_image_is_loaded_fast_too(
    mode: str, image_format: str, options: dict[str, object]
) -> None:
    image = photograph("chelsea")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    data = encode(image.convert(mode), image_format, **options)
    for view in range(3):
        difference = np.abs(compare(data, size=190, view=view))
        # Nothing has sharper edges than two levels alone.
        assert difference.mean() < (1 if mode == "1" else 0.3)
        assert difference.max() <= (20 if mode == "1" else 6)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_rows": 1}),
        ("PNG", {}),
        ("WEBP", {}),
    ],
)
@pytest.mark.parametrize("size", [32, 190])
def test_truncated_image_is_refused_where_the_reference_refuses_it(
    image_format: str, options: dict[str, object], size: int
) -> None:
    data = encode(photograph("chelsea"), image_format, **options)
    for end in [len(data) * part // 16 for part in range(16)]:
        for mode in ("reference", "fast"):
            with pytest.raises(DataError, match=r"shard.tar: sample 'a': cannot decode"):
                load(data[:end], mode, size=size)
    # All pixels may be there when the last bytes are not: PNG's are no part of the picture.
    for end in range(len(data) - 20, len(data)):
        assert outcome(data[:end], "fast") == outcome(data[:end], "reference")
        assert image_format == "PNG" or outcome(data[:end], "fast") != "loaded"
    # What follows an image hurts neither.
    for mode in ("reference", "fast"):
        assert load(data + b"\0" * 99, mode, size=size)


@settings(max_examples=150)
@given(
    st.sampled_from(["JPEG", "PROGRESSIVE", "PNG", "WEBP"]),
    st.integers(0, 10**6),
    st.binary(min_size=1, max_size=9),
)
def test_damage_has_the_same_outcome_in_both_modes(
    image_format: str, place: int, noise: bytes
) -> None:
    image = make_waves(48, 40)
    if image_format == "PROGRESSIVE":
        data = bytearray(encode(image, progressive=True))
    else:
        data = bytearray(encode(image, image_format))
    start = place % len(data)
    data[start : start + len(noise)] = noise
    assert outcome(bytes(data), "fast") == outcome(bytes(data), "reference")
    if outcome(bytes(data), "fast") == "loaded":
        difference = np.abs(compare(bytes(data), size=32))
        assert difference.mean() < 1


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff", b"\xff\xd8" * 99])
def test_other_bytes_are_refused_fast(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot decode"):
        load(data, "fast")


def test_decompression_bomb_is_refused_fast() -> None:
    data = encode(make_waves(16, 16))
    size = data.index(b"\xff\xc0") + 5
    bomb = data[:size] + b"\xff\x00\xff\x00" + data[size + 4 :]  # 65280 x 65280, 12 GB
    with pytest.raises(DataError, match="pixels"):
        load(bomb, "fast")
    # 10000 x 10000: less than where Pillow itself stops, more than the limit.
    bomb = data[:size] + b"\x27\x10\x27\x10" + data[size + 4 :]
    with pytest.raises(DataError, match="pixels"):
        load(bomb, "fast")


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_long_thin_image_is_refused_in_both_modes(mode: ViewMode) -> None:
    data = encode(Image.new("RGB", (60000, 2)))
    with pytest.raises(DataError, match=r"an image of 60000x2 pixels.*remove it"):
        load(data, mode)


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_view_that_the_policy_lacks_is_an_error_in_both_modes(mode: ViewMode) -> None:
    with pytest.raises(ValueError, match="view 10: policy 'ten_crop' has views 0 to 9"):
        load(encode(make_waves(40, 40)), mode, policy="ten_crop", size=16, views=(0, 10))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_decoder_gives_the_pixels_of_pillow(mode: str, progressive: bool) -> None:
    for name in PHOTOGRAPHS:
        data = encode(photograph(name).convert(mode), progressive=progressive)
        header = read_jpeg_header(data, name=name)
        assert header is not None
        assert (header.width, header.height) == photograph(name).size
        assert header.orientation == 1
        pixels = decode_jpeg(data, header)
        assert np.array_equal(pixels, decode_image(data, name=name))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_decoding_averages_squares(reduction: int) -> None:
    data = encode(photograph("rocket"), subsampling=0, quality=95)
    header = read_jpeg_header(data, name="a")
    assert header is not None
    pixels = decode_jpeg(data, header, reduction=reduction)
    assert pixels is not None
    assert pixels.shape == (-(-425 // reduction) + (426 % reduction == 1), -(-639 // reduction), 3)
    whole = np.asarray(decode_image(data, name="a"))
    height, width = 426 // reduction, 639 // reduction
    squares = whole[: height * reduction, : width * reduction].astype(float)
    means = squares.reshape(height, reduction, width, reduction, 3).mean(axis=(1, 3))
    assert np.abs(pixels[:height, :width] - means).mean() < 1.5


def test_fast_decoder_leaves_the_unusual_to_pillow() -> None:
    data = encode(photograph("chelsea"))
    header = read_jpeg_header(data, name="a")
    assert header is not None
    assert decode_jpeg(data[:-2], header) is None
    # A file that shows the two parsers different sizes.
    other = read_jpeg_header(encode(make_waves(16, 16)), name="a")
    assert other is not None
    assert decode_jpeg(data, other) is None
    assert read_jpeg_header(encode(photograph("chelsea").convert("CMYK")), name="a") is None
    assert read_jpeg_header(encode(make_waves(16, 16), "PNG"), name="a") is None


@pytest.mark.data
def test_difference_on_imagenet_photographs_is_as_documented(test_data_dir: Path) -> None:
    means: dict[bool, list[float]] = {False: [], True: []}
    with tarfile.open(test_data_dir / "imagenet-sample" / "val.tar.gz") as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.upper().endswith(".JPEG") else None
            if file is None:
                continue
            data = file.read()
            difference = compare(data, size=256, key=member.name)
            _, crop = load(data, "fast", key=member.name)[0]
            sizes = find_resize_sizes(
                *decode_image(data, name="a").size, short_side=crop.short_side, name="a"
            )
            means[len(sizes) > 1].append(float(np.abs(difference).mean()))
            assert abs(difference.mean()) < 0.7
    assert len(means[False]) > 20
    assert np.mean(means[False]) < 0.15
    assert max(means[False]) < 0.7
    assert max(means[True], default=0) < 4
