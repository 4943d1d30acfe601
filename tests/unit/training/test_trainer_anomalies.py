"""What the trainer does about numbers that go wrong, step by step, with its toy."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy_training import Killed, Run, ToyConfig, ToyTask, is_equal
from torch import Tensor

from fqgan_dist.errors import NumericsError
from fqgan_dist.training.config import AnomalyConfig
from fqgan_dist.training.trainer import TrainingResult


class Sick(ToyTask):
    """Meets micro-batches that are not finite at some steps."""

    sick_steps: Sequence[int] = ()

    def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        if step in self.sick_steps:
            micro_batches = [micro_batches[0], micro_batches[1] * math.nan, micro_batches[2]]
        return super().train_step(micro_batches, step)


def fit(run: Run, *steps: int) -> tuple[TrainingResult, Sick]:
    task = Sick(run.config, ToyConfig())
    task.sick_steps = steps
    return run.fit(task=task)[0], task


def run_of(folder: Path, **anomalies: Any) -> Run:
    return Run(folder, steps=12, anomalies=AnomalyConfig(**anomalies))


def skipped(run: Run) -> list[tuple[int, int, int]]:
    """List step, first and last position of what the ledger says was skipped."""
    report = run.store.check_ledger(lambda _: None)
    assert report.problems == []
    assert report.positions == 72
    commits = run.store.list_commits()
    return [
        (each.step, each.start, each.end)
        for commit in commits
        if commit.consumed is not None
        for each in commit.consumed.skipped
    ]


def weights(task: ToyTask) -> Mapping[str, Tensor]:
    return {
        f"{part}/{name}": tensor
        for part, tensors in task.state_dict().items()
        if part != "toy_ema"
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


@pytest.mark.parametrize("step", [1, 4, 6, 12])
def test_a_step_is_skipped_named_and_in_the_ledger(
    step: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        _, task = fit(run, step)
    assert task.steps_done == list(range(1, 13))
    assert skipped(run) == [(step, 6 * (step - 1), 6 * step)]
    said = (
        f"step {step}: toy/loss/total, toy/gradient_norm is not finite; micro-batch 1 (rank 0): "
        f"images {step}-1-0, {step}-1-1; on_not_finite: skip, 1 of 3"
    )
    assert said in caplog.text
    assert all(torch.isfinite(each).all() for each in weights(task).values())
    assert {"train/skipped_steps": 1.0, "train/rollbacks": 0.0}.items() <= {
        name: value for record in run.records() for name, value in record.items()
    }.items()


def test_a_rollback_ends_as_a_run_that_never_saw_the_images(tmp_path: Path) -> None:
    run = run_of(tmp_path / "back", on_not_finite="rollback")
    _, task = fit(run, 5)
    # Checkpoints are of steps 3, 6, 9, 12.
    assert task.steps_done == [1, 2, 3, 4, 5, 4, 6, 7, 8, 9, 10, 11, 12]
    assert skipped(run) == [(5, 24, 30)]
    other = run_of(tmp_path / "skip")
    _, without = fit(other, 5)
    theirs = weights(without)
    assert all(torch.equal(each, theirs[name]) for name, each in weights(task).items())
    steps = [record["step"] for record in run.records()]
    assert steps == sorted(steps)


def test_too_many_skips_are_a_rollback_and_that_goes_past_all_of_them(tmp_path: Path) -> None:
    run = run_of(tmp_path, max_skips=1)
    _, task = fit(run, 7, 8)
    assert task.steps_done == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [each[0] for each in skipped(run)] == [7, 8]


@pytest.mark.parametrize(("step", "newest"), [(2, "there is no checkpoint yet"), (5, "of step 3")])
def test_the_end_tells_of_a_checkpoint_only_where_there_is_one(
    step: int, newest: str, tmp_path: Path
) -> None:
    run = run_of(tmp_path, on_not_finite="stop")
    with pytest.raises(NumericsError, match=rf"step {step}: toy/loss/total.*{newest}"):
        fit(run, step)
    assert [commit.step for commit in run.store.list_commits()] == ([3] if step == 5 else [])


def test_without_a_checkpoint_a_rollback_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"no checkpoint yet to go back to"):
        fit(run_of(tmp_path, on_not_finite="rollback"), 2)


def test_numbers_that_come_again_end_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path, on_not_finite="rollback", max_rollbacks=2)
    with pytest.raises(NumericsError, match=r"more than max_rollbacks \(2\)"):
        fit(run, 4, 5, 6)
    assert [commit.step for commit in run.store.list_commits()] == [3]


def test_a_spike_is_reported_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Spiky(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            factor = 100.0 if step == 9 else 1.0
            return super().train_step([each * factor for each in micro_batches], step)

    run = run_of(tmp_path, spike_window=8, spike_factor=50.0)
    with caplog.at_level(logging.WARNING):
        run.fit(task=Spiky(run.config, ToyConfig()))
    assert "step 9: toy/gradient_norm is a spike" in caplog.text
    assert skipped(run) == []
    assert [each["train/spike_step"] for each in run.records() if "train/spike_step" in each] == [9]


def test_a_run_killed_after_a_skip_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    whole, broken = run_of(tmp_path / "whole"), run_of(tmp_path / "broken")
    _, expected = fit(whole, 5)
    for killed_before in (6, 8):
        task = Sick(broken.config, ToyConfig())
        task.sick_steps = (5,)
        with pytest.raises(Killed):
            broken.fit(task=task, killed_before=killed_before)
    _, task = fit(broken, 5)
    assert is_equal(task, expected)
    assert skipped(broken) == skipped(whole)
