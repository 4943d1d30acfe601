from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from fqgan_dist.training.config import ScheduleConfig
from fqgan_dist.training.schedule import compute_lr


def test_constant_is_the_peak_at_every_step() -> None:
    config = ScheduleConfig(lr=2e-4)
    assert {compute_lr(config, step, 10) for step in range(1, 20)} == {2e-4}


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_warmup_rises_linearly_and_is_followed_by_the_peak(kind: str) -> None:
    config = ScheduleConfig(lr=1.0, kind=kind, warmup_steps=4)  # pyright: ignore[reportArgumentType]
    assert [compute_lr(config, step, 100) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_is_the_closed_form_and_ends_at_the_minimum() -> None:
    config = ScheduleConfig(lr=3.0, kind="cosine", warmup_steps=2, min_ratio=0.1)
    for step in range(3, 13):
        progress = (step - 3) / 10
        expected = 3.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        assert compute_lr(config, step, 12) == pytest.approx(expected, rel=1e-15)
    assert compute_lr(config, 13, 12) == compute_lr(config, 99, 12) == pytest.approx(0.3)


def test_linear_falls_by_equal_amounts_and_ends_at_the_minimum() -> None:
    config = ScheduleConfig(lr=1.0, kind="linear", min_ratio=0.5)
    rates = [compute_lr(config, step, 4) for step in range(1, 7)]
    assert rates == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.5])


def test_a_training_that_is_all_warmup_reaches_its_peak() -> None:
    config = ScheduleConfig(lr=1.0, kind="cosine", warmup_steps=4)
    assert compute_lr(config, 4, 4) == 1.0
    assert compute_lr(config, 5, 4) == 0.0


def test_step_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        compute_lr(ScheduleConfig(lr=1.0), 0, 10)


def test_a_minimum_without_a_decay_is_refused() -> None:
    with pytest.raises(ValidationError, match="no effect with kind: constant"):
        ScheduleConfig(lr=1.0, min_ratio=0.1)
