"""What a run on a cluster reserves, and settings of it that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.placement import configured_sizes, plan_placement, planned_sizes
from fqgan_dist.stages.preflight import check_settings

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
ON_RAY = ("execution=ray", "ray.train.num_workers=4", "ray.train.cpus=2")
"""Each stage of the tiny run has two micro-batches of four images."""


def load(*overrides: str) -> RunConfig:
    return load_config(TINY, overrides, RunConfig)


def shared(size: int) -> tuple[str, ...]:
    return tuple(
        f"{stage}.training.ranks_per_micro_batch={size}"
        for stage in ("tokenizer", "autoregressive")
    )


def place(*overrides: str) -> dict[str, Any]:
    return plan_placement(load(*ON_RAY, *overrides))


def test_one_process_without_a_cluster() -> None:
    assert plan_placement(load())["processes"] == 1
    assert list(configured_sizes(load("ray.train.num_workers=4"))) == [1]


def test_train_workers_and_pools_are_listed_with_what_each_reserves() -> None:
    placement = place("ray.train.gpus=1", "ray.pools.codes={max_actors: 3, gpus: 0.5}")
    workers = placement["train_workers"]
    assert (workers["count"], workers["cpus_each"], workers["gpus_each"]) == (4, 2.0, 1.0)
    assert workers["strategy"] == "PACK"
    assert set(placement["pools"]) == {"shards", "teachers", "codes", "samples", "evaluation"}
    assert "exports" in place("samples.export=png")["pools"]
    codes = placement["pools"]["codes"]
    assert (codes["min_actors"], codes["max_actors"], codes["gpus_each"]) == (1, 3, 0.5)
    # The stages follow each other, so it is a maximum and no sum.
    assert placement["most_at_a_time"] == {"cpus": 8.0, "gpus": 4.0}


def test_only_the_stages_of_the_run_are_placed() -> None:
    placement = place("stages=[codes]")
    assert placement["train_workers"] is None
    assert list(placement["pools"]) == ["codes"]
    assert placement["most_at_a_time"] == {"cpus": 1.0, "gpus": 0.0}


def test_teachers_inside_the_train_workers_need_no_pool() -> None:
    assert "teachers" not in place("teachers.precompute=false")["pools"]


def test_more_workers_than_micro_batches_are_refused_with_the_setting_to_change() -> None:
    with pytest.raises(ConfigError) as caught:
        check_settings(load(*ON_RAY))
    for stage in ("tokenizer", "autoregressive"):
        assert (
            f"{stage}.training.ranks_per_micro_batch: with 1, 4 train workers cannot share 2 "
            f"micro-batches per step" in str(caught.value)
        )
    check_settings(load(*ON_RAY, *shared(2)))
    check_settings(load(*ON_RAY, *shared(4)))


def test_workers_that_make_no_whole_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="groups of 2 ranks cannot be made of 3 train worker"):
        check_settings(load(*ON_RAY, *shared(2), "ray.train.num_workers=3"))


def test_of_a_range_the_sizes_that_can_share_a_step_are_valid() -> None:
    config = load(*ON_RAY, *shared(2), "ray.train.num_workers=[1,9]")
    check_settings(config)
    assert planned_sizes(config) == {"tokenizer": [2, 4], "autoregressive": [2, 4]}
    workers = plan_placement(config)["train_workers"]
    assert (workers["count"], workers["valid_sizes"]) == (4, planned_sizes(config))
    assert plan_placement(config)["most_at_a_time"]["cpus"] == 8.0


def test_a_range_without_a_valid_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="no number from 5 to 9 is valid for the tokenizer"):
        check_settings(load(*ON_RAY, *shared(2), "ray.train.num_workers=[5,9]"))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("[3,2]", r"the most \(2\) is less than the least \(3\)"),
        ("[0,2]", r"num_workers\.0: 0: Input should be greater than 0"),
        ("[2]", r"num_workers\.1: required"),
        ("0", "num_workers: 0: Input should be greater than 0"),
    ],
)
def test_what_is_no_range_is_refused(value: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(*ON_RAY, f"ray.train.num_workers={value}")


def test_a_group_of_several_ranks_does_not_fit_one_process() -> None:
    with pytest.raises(ConfigError, match="groups of 2 ranks cannot be made of 1 train worker"):
        check_settings(load(*shared(2)))
    # Under torchrun the launcher decides.
    check_settings(load(*shared(2)), world_size=2)


def test_only_stages_that_run_are_checked() -> None:
    settings = (*ON_RAY, "tokenizer.training.ranks_per_micro_batch=2")
    check_settings(load(*settings, "stages=[tokenizer]"))
    with pytest.raises(ConfigError, match=r"autoregressive\.training\.ranks_per_micro_batch"):
        check_settings(load(*settings))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (("device=cuda", "stages=[tokenizer]"), r"ray\.train\.gpus: 0 with device: 'cuda'"),
        (("device=cuda", "stages=[codes]"), r"ray\.pools\.codes\.gpus: 0 with device: 'cuda'"),
        (("device=cpu", "ray.train.gpus=1"), r"ray\.train\.gpus: 1 with device: 'cpu'"),
    ],
)
def test_reserved_gpus_must_fit_the_device(settings: tuple[str, ...], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        check_settings(load(*ON_RAY, *shared(2), *settings))
    check_settings(load(*ON_RAY, *shared(2), *settings, "device=auto"))
