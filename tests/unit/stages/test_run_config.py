"""What follows from other settings is one key; what is wrong is said line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.config import dump_config, load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
REDUNDANT = (
    "data.views.image_size=32",
    "codes.views.image_size=32",
    "autoregressive.model.num_codebooks=3",
    "autoregressive.model.codebook_size=32",
    "autoregressive.model.grid_size=4",
    "tokenizer.model.codebooks.1.feature_dim=16",
    "tokenizer.model.codebooks.2.feature_dim=16",
)


def load(*overrides: str) -> RunConfig:
    return load_config(TINY, overrides, RunConfig)


def find_problems(*overrides: str) -> list[str]:
    """Return the lines of the error, after checking that the first counts the others."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    head, *lines = str(caught.value).split("\n")
    assert head.endswith(f": {len(lines)} problem(s)")
    return [line.strip() for line in lines]


def test_other_images_are_one_key() -> None:
    config = load("tokenizer.model.image_size=48")
    assert config.data.views.image_size == config.codes.views.image_size == 48
    assert config.autoregressive.model.grid_size == 6


def test_another_downsampling_is_one_key() -> None:
    config = load("tokenizer.model.channel_multipliers=[1, 2, 2]")
    assert config.autoregressive.model.grid_size == 8


def test_another_codebook_size_is_one_key() -> None:
    config = load("tokenizer.model.codebook_size=64")
    assert config.autoregressive.model.codebook_size == 64


def test_four_codebooks_are_one_list() -> None:
    names = ", ".join(f"{{name: book_{number}}}" for number in range(4))
    config = load(
        f"tokenizer.model.codebooks=[{names}]", "teachers.networks=[]", "data.num_views=null"
    )
    assert config.autoregressive.model.num_codebooks == 4


def test_a_wider_teacher_is_one_key() -> None:
    config = load("teachers.networks.1.architecture.width=32")
    dims = [book.feature_dim for book in config.tokenizer.model.codebooks]
    assert dims == [None, 16, 32]


def test_a_named_teacher_has_its_published_size() -> None:
    config = load(
        "teachers.networks.1={kind: clip, architecture: ViT-L-14-quickgelu, weights: {source: hub}}"
    )
    assert config.tokenizer.model.codebooks[2].feature_dim == 1024


def test_redundant_keys_that_agree_load_to_the_same_config() -> None:
    assert load(*REDUNDANT) == load()


def test_a_config_as_older_runs_resolved_it_loads_to_the_same_config() -> None:
    perceptual = "{network: squeeze, weights: random, weights_sha256: null, dropout: true}"
    assert load(*REDUNDANT, f"tokenizer.perceptual={perceptual}") == load()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.views.image_size=64",
            "data.views.image_size is 64, but tokenizer.model.image_size gives 32",
        ),
        (
            "autoregressive.model.num_codebooks=2",
            "num_codebooks is 2, but the number of tokenizer.model.codebooks gives 3",
        ),
        (
            "autoregressive.model.grid_size=8",
            "tokenizer.model.image_size with channel_multipliers gives 4; remove grid_size",
        ),
        (
            "tokenizer.model.codebooks.2.feature_dim=64",
            "codebooks.2.feature_dim is 64, but teachers.networks.1 (clip) gives 16",
        ),
    ],
)
def test_redundant_keys_that_disagree_are_named_with_what_they_follow_from(
    override: str, message: str
) -> None:
    (problem,) = find_problems(override)
    assert message in problem


def test_a_resolved_config_loads_again_and_still_has_one_key_each(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load()))
    assert load_config(path, [], RunConfig) == load()
    larger = load_config(path, ["tokenizer.model.image_size=64"], RunConfig)
    assert larger == load("tokenizer.model.image_size=64")


def test_models_are_dumped_whole() -> None:
    # A checkpoint keeps the architecture by itself.
    assert load().autoregressive.model.model_dump()["grid_size"] == 4
    assert load().tokenizer.model.model_dump()["codebooks"][1]["feature_dim"] == 16


def test_problems_of_several_sections_come_at_once_and_are_counted() -> None:
    problems = find_problems(
        "data.validation_source=elsewhere",
        "data.on_damage=fail",
        "data.max_damaged_in_a_row=7",
        "tokenizer.model.image_size=33",
        "tokenizer.model.adapter.num_heads=3",
        "tokenizer.training.global_batch_size=7",
        "tokenizer.training.ranks_per_micro_batch=3",
        "autoregressive.model.width=18",
        "samples.count=-1",
    )
    for begin in (
        "data: max_damaged_in_a_row: 7",
        "data: validation_source: 'elsewhere'",
        "tokenizer.model: image_size: 33",
        "tokenizer.model: adapter.num_heads: 3",
        "tokenizer.training: global_batch_size: 7",
        "tokenizer.training: micro_batch_size: 4",
        "autoregressive.model: width: 18",
        "samples.count: -1",
    ):
        assert len([line for line in problems if line.startswith(begin)]) == 1, begin
    assert len(problems) == 8


def test_sections_that_disagree_are_all_named() -> None:
    problems = find_problems(
        "codes.views.image_size=16",
        "autoregressive.model.codebook_size=64",
        "tokenizer.model.codebooks.1.teacher=dino",
        "data.num_views=null",
    )
    assert len(problems) == 5
    assert problems[2].startswith("teachers.networks: 'dino' is named by a codebook but not")
    assert problems[3].startswith("teachers.networks: 'dinov2' is configured but no codebook")


def test_what_follows_from_a_wrong_setting_is_not_reported_too() -> None:
    (problem,) = find_problems("tokenizer.model.image_size=33")
    assert problem.startswith("tokenizer.model: image_size: 33")
    (problem,) = find_problems("teachers.networks.0.architecture.num_heads=3")
    assert problem.startswith("teachers.networks.0.architecture: width: 16 is not a multiple of")


@pytest.mark.parametrize(
    ("overrides", "seed"),
    [
        (["tokenizer.perceptual.weights=random"], 3),  # as it was spelt, and meant, formerly
        (["tokenizer.perceptual={weights: random, weights_sha256: null}"], 3),
        (["tokenizer.perceptual.weights={source: random}"], 0),
        (["tokenizer.perceptual.weights={source: random, seed: 5}"], 5),
    ],
)
def test_random_perceptual_weights_have_the_seed_that_they_had(
    overrides: list[str], seed: int
) -> None:
    config = load("tokenizer.training.seed=3", *overrides)
    assert config.tokenizer.perceptual.weights.seed == seed


@pytest.mark.parametrize("stage", ["tokenizer", "autoregressive"])
@pytest.mark.parametrize("source", ["hub", "random"])
def test_a_training_starts_from_a_file_only(stage: str, source: str) -> None:
    (problem,) = find_problems(f"{stage}.init_from={{source: {source}}}")
    assert problem.startswith(f"{stage}.init_from: source: '{source}' holds no model of this")
    assert "fqgan checkpoints export" in problem


@pytest.mark.parametrize("value", [None, 3, "x", [], {"model": 3}, {"model": {"codebooks": 7}}])
def test_sections_of_another_shape_are_reported_where_they_stand(value: Any) -> None:
    values = load().model_dump(mode="json") | {"tokenizer": value}
    with pytest.raises(ValueError, match="tokenizer"):
        RunConfig.model_validate(values)
