from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.index import SourceProblem
from fqgan_dist.data.view_loading import load_view
from fqgan_dist.data.views import apply_view
from fqgan_dist.sharding.images import EncodedImage, ImagePolicy, make_image


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make(data: bytes, **policy: object) -> EncodedImage:
    image = make_image(data, "a/x.png", ImagePolicy.model_validate(policy))
    assert isinstance(image, EncodedImage)
    return image


def test_original_keeps_the_bytes() -> None:
    data = encode(noise(50, 40))
    image = make(data)
    assert (image.data, image.extension, image.width, image.height) == (data, "png", 50, 40)


@pytest.mark.parametrize(
    ("size", "policy", "made"),
    [
        ((90, 60), {"short_side": 30}, (45, 30)),
        ((60, 90), {"short_side": 30}, (30, 45)),
        ((30, 90), {"short_side": 30}, None),
        ((20, 90), {"short_side": 30}, None),
        ((20, 90), {"short_side": 30, "only_if_bigger": False}, (30, 135)),
        ((30, 90), {"short_side": 30, "only_if_bigger": False}, None),
        ((90, 60), {"crop": 32}, (32, 32)),
        ((32, 60), {"crop": 32}, (32, 32)),
        ((32, 32), {"crop": 32}, None),
        ((31, 60), {"crop": 32}, None),
        ((31, 60), {"crop": 32, "only_if_bigger": False}, (32, 32)),
        ((32, 32), {"crop": 32, "only_if_bigger": False}, None),
    ],
)
def test_images_get_the_size_that_the_policy_says(
    size: tuple[int, int], policy: dict[str, object], made: tuple[int, int] | None
) -> None:
    data = encode(noise(*size))
    image = make(data, **policy)
    assert (image.width, image.height) == (made or size)
    assert image.extension == ("png" if made is None else "jpg")
    assert (image.data == data) == (made is None)
    assert Image.open(io.BytesIO(image.data)).size == (made or size)


def test_crop_is_that_of_the_evaluation() -> None:
    original = noise(90, 60)
    image = make(encode(original), crop=32, jpeg_quality=100)
    config = ViewConfig(policy="center", image_size=32)
    expected, _ = apply_view(original, config, seed=0, key="x", view=0)
    stored = np.asarray(Image.open(io.BytesIO(image.data)))
    # Only the JPEG of the highest quality lies between them.
    assert np.abs(stored.astype(int) - expected.astype(int)).mean() < 1.5


def test_quality_decides_the_bytes() -> None:
    data = encode(noise(90, 60))
    assert len(make(data, short_side=30, jpeg_quality=90).data) < len(
        make(data, short_side=30).data
    )


def test_what_does_not_decode_is_a_problem_and_says_why_in_the_same_words() -> None:
    problems = [make_image(b"no image", "a/x.png", ImagePolicy()) for _ in range(2)]
    assert problems[0] == problems[1]
    assert isinstance(problems[0], SourceProblem)
    assert (problems[0].name, problems[0].action) == ("a/x.png", "skipped")
    assert "cannot be decoded" in problems[0].reason
    assert "0x" not in problems[0].reason


@pytest.mark.parametrize(
    ("size", "policy", "made"),
    [
        ((20, 70_000), {"short_side": 16, "view_short_side": 16}, None),
        ((20, 90_000), {"short_side": 16}, "16x72000 pixels"),
        ((8, 8_000), {"short_side": 320, "only_if_bigger": False}, "320x320000 pixels"),
    ],
)
def test_an_image_that_would_be_too_long_for_a_jpeg_is_a_problem(
    size: tuple[int, int], policy: dict[str, object], made: str | None
) -> None:
    image = make_image(
        encode(Image.new("RGB", size)), "a/x.png", ImagePolicy.model_validate(policy)
    )
    if made is None:
        assert isinstance(image, EncodedImage)
    else:
        assert isinstance(image, SourceProblem)
        assert made in image.reason


@pytest.mark.parametrize(
    ("size", "view_short_side", "is_taken"),
    [((1, 300), 320, True), ((1, 1400), 320, False), ((1, 1400), 40, True), ((300, 1), 640, False)],
)
def test_an_image_that_no_view_in_use_can_be_made_of_is_a_problem(
    size: tuple[int, int], view_short_side: int, is_taken: bool
) -> None:
    policy = ImagePolicy(view_short_side=view_short_side)
    image = make_image(encode(Image.new("RGB", size)), "a/x.png", policy)
    view = ViewConfig(policy="center", image_size=view_short_side)
    if is_taken:
        assert isinstance(image, EncodedImage)
        load_view(image.data, view, seed=0, key="x", view=0, name="x")
    else:
        assert isinstance(image, SourceProblem)
        assert f"resized to a short side of {view_short_side}" in image.reason


def test_only_unusual_views_are_told_by_the_index() -> None:
    for policy in (ImagePolicy(), ImagePolicy(short_side=320), ImagePolicy(view_short_side=640)):
        told = policy.describe_images()
        assert ("view_short_side" in told) == (policy.view_short_side != 320)
        assert ImagePolicy.parse_description(told) == policy


def test_an_image_that_would_become_too_large_is_a_problem() -> None:
    policy = ImagePolicy(crop=512, only_if_bigger=False)
    problem = make_image(encode(noise(8, 4000)), "a/x.png", policy)
    assert isinstance(problem, SourceProblem)
    assert "more than" in problem.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"short_side": 320, "crop": 256}, "exclude each other"),
        ({"jpeg_quality": 90}, "jpeg_quality: has no effect"),
        ({"only_if_bigger": False}, "only_if_bigger: has no effect"),
        ({"crop": 8}, "crop"),
    ],
)
def test_policies_without_effect_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ImagePolicy.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"short_side": 320}, {"crop": 256, "jpeg_quality": 90, "only_if_bigger": False}],
)
def test_a_policy_can_be_restored_from_what_the_index_tells(settings: dict[str, object]) -> None:
    policy = ImagePolicy.model_validate(settings)
    told = policy.describe_images() | {"order_seed": 3}
    assert ImagePolicy.parse_description(told).describe_images() == policy.describe_images()


def test_foreign_shards_are_extended_with_original_bytes() -> None:
    assert ImagePolicy.parse_description({"kind": "indexed"}) == ImagePolicy()
