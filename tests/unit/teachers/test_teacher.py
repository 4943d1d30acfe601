from __future__ import annotations

import logging

import pytest
import torch
from support.photograph_crops import draw_crops
from torch.nn import functional

from fqgan_dist.errors import ConfigError
from fqgan_dist.teachers.config import (
    ClipArchitecture,
    ClipTeacherConfig,
    Dinov2Architecture,
    Dinov2TeacherConfig,
    TeacherConfig,
)
from fqgan_dist.teachers.teacher import Teacher, build_teacher
from fqgan_dist.weights.config import WeightsConfig

SMALL_CLIP = ClipArchitecture(image_size=64, patch_size=8, width=64, num_layers=3, num_heads=4)
SMALL_DINOV2 = Dinov2Architecture(image_size=64, patch_size=8, width=48, num_layers=3, num_heads=4)


def make_config(kind: str, seed: int = 0, *, input_size: int = 64) -> TeacherConfig:
    weights = WeightsConfig(source="random", seed=seed)
    if kind == "clip":
        sizes = SMALL_CLIP.model_copy(update={"image_size": input_size})
        return ClipTeacherConfig(architecture=sizes, weights=weights)
    return Dinov2TeacherConfig(architecture=SMALL_DINOV2, weights=weights, input_size=input_size)


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return build_teacher(make_config(request.param), device="cpu")


def test_random_features_tell_photographs_apart(teacher: Teacher):
    """The libraries' own initialisation gives a mean cosine of 0.78 to 0.89 here."""
    per_photograph = 8
    features = functional.normalize(teacher(draw_crops(per_photograph, 0)), dim=1)
    cosines = features @ features.T
    photograph = torch.arange(len(features)) // per_photograph
    same = photograph[:, None] == photograph
    off_diagonal = ~torch.eye(len(features), dtype=torch.bool)
    assert cosines[off_diagonal].mean() < 0.5
    # Crops of one photograph are nearer to each other than to the rest: there is something to
    # learn.
    assert cosines[same & off_diagonal].mean() > cosines[~same].mean() + 0.2


def test_features_have_the_declared_shape(teacher: Teacher):
    features = teacher(draw_crops(1, 0)[:3])
    assert features.shape == (3, teacher.feature_dim)
    assert features.dtype == torch.float32
    assert teacher.feature_dim == make_config(teacher.name).feature_dim


def test_uint8_and_float_images_give_the_same_features(teacher: Teacher):
    images = draw_crops(1, 0)[:3]
    as_float = (images / 255 - 0.5) / 0.5
    torch.testing.assert_close(teacher(images), teacher(as_float), rtol=1e-4, atol=1e-4)


def test_preprocessing_is_the_published_one(teacher: Teacher):
    statistics = {
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in statistics[teacher.name])
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    # Nearest from 128 to 64 takes every other pixel.
    pixels = (images[:, :, ::2, ::2] / 255 - mean) / std
    with torch.no_grad():
        expected = teacher.network(pixels)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-5, atol=1e-5)


def test_features_are_float32_under_autocast(teacher: Teacher):
    images = draw_crops(1, 0)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = teacher(images)
    assert features.dtype == torch.float32
    assert functional.cosine_similarity(features, teacher(images)).min() > 0.99


def test_is_frozen_and_stays_in_evaluation_mode(teacher: Teacher):
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(draw_crops(1, 0)[:1]).requires_grad


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), "expected \\(B, 3, H, W\\)"),
        (torch.zeros(2, 1, 64, 64), "expected \\(B, 3, H, W\\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), "expected uint8, or float"),
    ],
)
def test_wrong_images_are_refused(teacher: Teacher, images: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        teacher(images)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_fingerprint_covers_weights_and_preprocessing_and_not_the_name(kind: str):
    base = make_config(kind)
    fingerprints = [
        build_teacher(config, device="cpu").fingerprint
        for config in (base, make_config(kind, seed=1), make_config(kind, input_size=32))
    ]
    assert len(set(fingerprints)) == 3
    renamed = base.model_copy(update={"name": "another"})
    assert build_teacher(renamed, device="cpu").fingerprint == fingerprints[0]


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_building_is_said_in_the_log_and_leaves_the_random_state_alone(
    kind: str, caplog: pytest.LogCaptureFixture
):
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        build_teacher(make_config(kind), device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert f"teacher '{kind}': random weights (seed 0): not comparable" in caplog.text


def test_a_staged_file_without_use_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes no file"):
        build_teacher(make_config("clip"), device="cpu", weights_path=tmp_path / "a.safetensors")
