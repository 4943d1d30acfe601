from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fqgan_dist.sharding import photographs
from fqgan_dist.sharding.photographs import PHOTOGRAPHS, crop_photograph, sample_photographs


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.float64)


@pytest.mark.parametrize(("split", "size"), [("train", 80), ("val", 64)])
def test_every_photograph_gives_the_asked_number_of_crops_of_one_size(split, size):
    crops = list(sample_photographs(split, image_size=64, crops_per_photograph=2, seed=0))
    assert [class_name for class_name, _, _ in crops] == [
        name for name in PHOTOGRAPHS for _ in "12"
    ]
    assert len({name for _, name, _ in crops}) == len(crops)
    assert {decode(data).shape for _, _, data in crops} == {(size, size, 3)}


def test_a_crop_is_a_function_of_its_arguments():
    first = crop_photograph("coffee", 3, "train", 32, 0)
    photographs._reduced_part.cache_clear()
    assert crop_photograph("coffee", 3, "train", 32, 0) == first
    assert crop_photograph("coffee", 4, "train", 32, 0) != first
    assert crop_photograph("coffee", 3, "train", 32, 1) != first


@pytest.mark.parametrize("image_size", [16, 64, 256])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_both_parts_have_room_for_their_crops(name: str, image_size: int):
    train = photographs._reduced_part(name, "train", image_size)
    val = photographs._reduced_part(name, "val", image_size)
    assert min(train.size) >= round(1.25 * image_size)
    assert min(val.size) >= image_size


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_training_crops_do_not_see_the_validation_strip(name: str, monkeypatch):
    # The same photograph with the strip painted white gives the same training part to the bit.
    image_size = 32
    before = photographs._reduced_part(name, "train", image_size)
    val = photographs._reduced_part(name, "val", image_size)
    photograph = photographs._load_photograph(photographs._FILES[name])
    reserved = round(photograph.width * val.width / (before.width + val.width))
    painted = photograph.copy()
    painted.paste("white", (photograph.width - reserved + 4, 0, *photograph.size))
    monkeypatch.setattr(photographs, "_load_photograph", lambda _: painted)
    photographs._reduced_part.cache_clear()
    try:
        after = photographs._reduced_part(name, "train", image_size)
        changed = photographs._reduced_part(name, "val", image_size)
    finally:
        photographs._reduced_part.cache_clear()
    assert after.tobytes() == before.tobytes()
    assert changed.tobytes() != val.tobytes()


def test_crops_of_one_photograph_differ_less_than_photographs_do():
    # The class must be learnable: mean colours of crops lie nearer to their own class's.
    means = np.array(
        [
            decode(data).mean((0, 1))
            for _, _, data in sample_photographs(
                "train", image_size=32, crops_per_photograph=8, seed=0
            )
        ]
    ).reshape(len(PHOTOGRAPHS), 8, 3)
    within = means.std(axis=1).mean()
    between = means.mean(axis=1).std(axis=0).mean()
    assert between > 3 * within
