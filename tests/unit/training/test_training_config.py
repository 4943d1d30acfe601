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
