from __future__ import annotations

import pytest

from fqgan_dist.config import parse_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.world import World


def parse(**changes: object) -> TrainingConfig:
    values: dict[str, object] = {
        "steps": 4,
        "global_batch_size": 12,
        "micro_batch_size": 3,
        "schedule": {"lr": 1e-3},
        "evaluate_every": 2,
        "evaluation_samples": 4,
        "checkpoint": {"every": 2},
    }
    return parse_config(values | changes, TrainingConfig, source="training")


def test_the_micro_batches_make_up_the_global_batch() -> None:
    assert parse().micro_batches_per_step == 4


@pytest.mark.parametrize(("world_size", "expected"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_accumulation_counts_idle_slots(world_size: int, expected: int) -> None:
    assert parse().gradient_accumulation_steps(World(world_size=world_size)) == expected


def test_ranks_that_share_a_micro_batch_split_its_images() -> None:
    shared = parse(micro_batch_size=6, ranks_per_micro_batch=3)
    assert shared.images_per_pass == 2
    assert shared.gradient_accumulation_steps(World(world_size=3)) == 2
    assert shared.gradient_accumulation_steps(World(world_size=6)) == 1


def test_ranks_that_cannot_split_a_micro_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 cannot be shared by ranks_per_micro_batch"):
        parse(ranks_per_micro_batch=2)


def test_a_global_batch_that_is_no_multiple_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError,
        match=r"global_batch_size: 250 is not a multiple of micro_batch_size \(32\); "
        r"nearest valid values are 224 and 256",
    ):
        parse(global_batch_size=250, micro_batch_size=32)


def test_a_global_batch_below_one_micro_batch_names_the_one_value_above() -> None:
    with pytest.raises(ConfigError, match=r"nearest valid values are 32$"):
        parse(global_batch_size=2, micro_batch_size=32)
