from __future__ import annotations

import pytest
from pydantic import ValidationError

from fqgan_dist.config import Config, parse_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.teachers.config import ClipTeacherConfig, Dinov2TeacherConfig, TeacherConfig

HUB = {"source": "hub"}
CLIP_SIZES = {"image_size": 64, "patch_size": 8, "width": 64, "num_layers": 3, "num_heads": 4}


class Holder(Config):
    """Stands for a run's configuration."""

    teachers: list[TeacherConfig]


def test_published_teachers_are_told_apart_by_kind():
    values = [
        {"kind": "clip", "architecture": "ViT-B-16-quickgelu", "weights": HUB},
        {"kind": "dinov2", "architecture": "facebook/dinov2-small", "weights": HUB},
    ]
    clip, dinov2 = parse_config({"teachers": values}, Holder, source="test").teachers
    assert isinstance(clip, ClipTeacherConfig)
    assert isinstance(dinov2, Dinov2TeacherConfig)
    assert (clip.name, dinov2.name) == ("clip", "dinov2")
    assert dinov2.input_size == 224


@pytest.mark.parametrize(
    ("kind", "architecture", "width"),
    [
        ("clip", "ViT-B-16-quickgelu", 768),
        ("clip", "ViT-L-14-quickgelu", 1024),
        ("dinov2", "facebook/dinov2-small", 384),
    ],
)
def test_feature_widths_are_those_of_the_paper(kind: str, architecture: str, width: int):
    values = {"teachers": [{"kind": kind, "architecture": architecture, "weights": HUB}]}
    (config,) = parse_config(values, Holder, source="test").teachers
    assert config.feature_dim == width


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "clip", "architecture": CLIP_SIZES, "weights": HUB}, "no network of these sizes"),
        ({"kind": "dinov2", "architecture": "facebook/dino", "weights": HUB}, "is unknown"),
        (
            {
                "kind": "dinov2",
                "architecture": "facebook/dinov2-small",
                "weights": HUB,
                "input_size": 225,
            },
            "225 is not a multiple of patch_size \\(14\\); nearest valid values are 224 and 238",
        ),
        (
            {"kind": "clip", "architecture": {**CLIP_SIZES, "num_heads": 5}, "weights": HUB},
            "64 is not a multiple of num_heads",
        ),
        ({"kind": "resnet", "architecture": "x", "weights": HUB}, "resnet"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Holder.model_validate({"teachers": [values]})


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViT-B-61", "'ViT-B-61' is unknown - expected one of ViT-B-32-quickgelu, "),
        ("ViT-B-16", "plain GELU - expected QuickGELU"),
        ("RN50-quickgelu", "is unknown"),  # no plain vision transformer
    ],
)
def test_unusable_clip_architectures_are_refused(architecture: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_config(
            {"architecture": architecture, "weights": HUB}, ClipTeacherConfig, source="test"
        )


def test_all_problems_of_a_teacher_are_reported():
    values = {"architecture": {**CLIP_SIZES, "num_heads": 5, "patch_size": 7}, "weights": HUB}
    with pytest.raises(ConfigError, match="2 problem") as caught:
        parse_config(values, ClipTeacherConfig, source="test")
    assert "64 is not a multiple of num_heads (5)" in str(caught.value)
    assert "64 is not a multiple of patch_size (7)" in str(caught.value)
