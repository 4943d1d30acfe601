from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from skimage import data as photographs
from torchvision.transforms import functional

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.views import CropRecord, apply_view, cut, num_views, resize_short_side
from fqgan_dist.errors import DataError

POLICIES = ("random_crop_flip", "ten_crop", "center")


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(photographs.astronaut()[:400])  # 512 x 400


def make_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def reference_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The function of ADM's image_datasets.py, written again from its description."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [32, 100, 256, 500])
def test_center_view_is_the_reference_crop(photograph: Image.Image, size: int) -> None:
    config = ViewConfig(policy="center", image_size=size)
    pixels, _ = apply_view(photograph, config, seed=0, key="a", view=0)
    assert np.array_equal(pixels, reference_center_crop(photograph, size))


@pytest.mark.parametrize("size", [32, 64, 256])
def test_ten_crops_are_those_of_torchvision(photograph: Image.Image, size: int) -> None:
    outer = Image.fromarray(reference_center_crop(photograph, int(size * 1.1)))
    expected = [np.asarray(crop) for crop in functional.ten_crop(outer, [size, size])]
    config = ViewConfig(policy="ten_crop", image_size=size)
    for view in range(10):
        pixels, _ = apply_view(photograph, config, seed=0, key="a", view=view)
        assert np.array_equal(pixels, expected[view]), f"view {view}"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.integers(5, 90),
    st.integers(5, 90),
    st.integers(4, 24),
    st.integers(0, 9),
    st.integers(0, 2**40),
)
def test_crop_record_tells_how_to_make_the_view(
    policy: str, width: int, height: int, size: int, view: int, seed: int
) -> None:
    image = make_noise(width, height)
    config = ViewConfig.model_validate({"policy": policy, "image_size": size})
    view %= num_views(config.policy) or 10
    pixels, crop = apply_view(image, config, seed=seed, key="k", view=view)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    short = min(crop.resized_height, crop.resized_width)
    resized = resize_short_side(image, short, name="k")
    assert resized.size == (crop.resized_width, crop.resized_height)
    assert 0 <= crop.top <= crop.resized_height - size
    assert 0 <= crop.left <= crop.resized_width - size
    assert np.array_equal(cut(resized, crop, size), pixels)


def test_random_views_have_the_distribution_of_the_reference() -> None:
    config = ViewConfig(policy="random_crop_flip", image_size=16)
    image = make_noise(40, 30)
    crops = [apply_view(image, config, seed=1, key=str(key), view=0)[1] for key in range(2000)]
    sizes, counts = np.unique([crop.resized_height for crop in crops], return_counts=True)
    assert sizes.tolist() == [16, 17, 18, 19, 20]
    assert counts.min() > 330  # 400 expected, four standard deviations are 72
    assert 900 < sum(crop.flip for crop in crops) < 1100
    largest = [crop for crop in crops if crop.resized_height == 20]
    assert {crop.top for crop in largest} == set(range(5))
    assert {crop.left for crop in largest} == set(range(round(40 * 20 / 30) - 16 + 1))


def test_random_view_is_the_reference_resize_and_crop(photograph: Image.Image) -> None:
    config = ViewConfig(policy="random_crop_flip", image_size=64)
    pixels, crop = apply_view(photograph, config, seed=7, key="a", view=3)
    size = min(crop.resized_height, crop.resized_width)
    image = photograph
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    expected = np.array(image)[crop.top : crop.top + 64, crop.left : crop.left + 64]
    assert np.array_equal(pixels, expected[:, ::-1] if crop.flip else expected)


def test_view_depends_on_seed_key_and_view_alone() -> None:
    config = ViewConfig(policy="random_crop_flip", image_size=16)
    image = make_noise(60, 50)
    first = apply_view(image, config, seed=1, key="a", view=2)[1]
    random.seed(5)
    np.random.seed(5)
    assert apply_view(image, config, seed=1, key="a", view=2)[1] == first
    others = [
        apply_view(image, config, seed=seed, key=key, view=view)[1]
        for seed, key, view in [(2, "a", 2), (1, "b", 2), (1, "a", 3)]
    ]
    assert first not in others
    assert len(set(map(repr, others))) == 3


def test_view_is_equal_in_another_process() -> None:
    code = (
        "import numpy as np, hashlib; from PIL import Image\n"
        "from fqgan_dist.data.config import ViewConfig\n"
        "from fqgan_dist.data.views import apply_view\n"
        "p = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)\n"
        "c = ViewConfig(policy='random_crop_flip', image_size=16)\n"
        "x, r = apply_view(Image.fromarray(p), c, seed=1, key='a', view=2)\n"
        "print(r, hashlib.sha256(x.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    config = ViewConfig(policy="random_crop_flip", image_size=16)
    pixels, crop = apply_view(make_noise(60, 50), config, seed=1, key="a", view=2)
    assert done.stdout.strip() == f"{crop} {hashlib.sha256(pixels.tobytes()).hexdigest()}"


def test_random_crop_never_changes() -> None:
    # Stored teacher features belong to these very crops.
    config = ViewConfig(policy="random_crop_flip", image_size=256)
    _, crop = apply_view(make_noise(400, 300), config, seed=0, key="n01440764_18", view=5)
    assert crop == RECORDED_CROP


def test_small_image_is_enlarged() -> None:
    config = ViewConfig(policy="center", image_size=64)
    _, crop = apply_view(make_noise(10, 8), config, seed=0, key="a", view=0)
    assert (crop.resized_height, crop.resized_width) == (64, 80)


def test_long_thin_image_does_not_fill_the_memory() -> None:
    config = ViewConfig(policy="center", image_size=256)
    with pytest.raises(DataError, match=r"sample 'a': an image of 60000x2 pixels.*remove it"):
        apply_view(make_noise(60000, 2), config, seed=0, key="a", view=0)


def test_view_that_the_policy_lacks_is_refused() -> None:
    image = make_noise(20, 20)
    for policy, view in (("center", 1), ("ten_crop", 10), ("random_crop_flip", -1)):
        config = ViewConfig.model_validate({"policy": policy, "image_size": 8})
        with pytest.raises(ValueError, match=f"view {view}"):
            apply_view(image, config, seed=0, key="a", view=view)


def test_image_that_is_not_rgb_is_refused() -> None:
    config = ViewConfig(policy="center", image_size=8)
    with pytest.raises(ValueError, match="image mode 'L'"):
        apply_view(make_noise(9, 9).convert("L"), config, seed=0, key="a", view=0)


def test_setting_without_effect_is_an_error() -> None:
    with pytest.raises(
        ValidationError, match=r"crop_ratio: 1.2 has no effect with policy 'center'"
    ):
        ViewConfig(policy="center", image_size=8, crop_ratio=1.2)
    assert ViewConfig(policy="ten_crop", image_size=8, crop_ratio=1.2).crop_ratio == 1.2


RECORDED_CROP = CropRecord(top=1, left=16, resized_height=259, resized_width=345, flip=False)
