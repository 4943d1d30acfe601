from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from support import toy_training
from support.counted_reads import count_reads
from support.records import read_records
from support.toy_training import DATASET_ID, PREFIX, Killed, Run, ToyConfig, ToyTask, is_equal
from torch import Tensor

from fqgan_dist.errors import CheckpointError, DataError, NoticeError, NumericsError
from fqgan_dist.notice import NOTICES
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metrics import metric_series
from fqgan_dist.telemetry.sessions import Session
from fqgan_dist.training import trainer
from fqgan_dist.training.config import (
    AnomalyConfig,
    CheckpointConfig,
)
from fqgan_dist.training.hooks import TrainerHook
from fqgan_dist.training.trainer import TrainingResult


class Moments(TrainerHook):
    """Notes when the trainer calls it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def start(self, session: Session) -> None:
        self.seen.append(("start", session.resumed_step))

    def step(self, step: int) -> None:
        self.seen.append(("step", step))

    def collect(self, step: int) -> None:
        self.seen.append(("collect", step))

    def record(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        self.seen.append(("record", step))

    def save(self, step: int) -> None:
        self.seen.append(("save", step))

    def end(self) -> None:
        self.seen.append(("end", 0))


class SlowSteps(TrainerHook):
    """Lets ten seconds pass with each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(trainer.time, "monotonic", lambda: self.now)

    def step(self, step: int) -> None:
        self.now += 10


@pytest.fixture
def unbroken(tmp_path: Path) -> tuple[Run, TrainingResult, ToyTask]:
    run = Run(tmp_path / "unbroken")
    return run, *run.fit()


@pytest.mark.parametrize("killed_before", [1, 3, 4, 5, 6, 7, 8])
def test_a_killed_run_goes_on_to_the_same_bits(
    unbroken: tuple[Run, TrainingResult, ToyTask], tmp_path: Path, killed_before: int
) -> None:
    run = Run(tmp_path / "killed")
    with pytest.raises(Killed):
        run.fit(killed_before=killed_before)
    result, task = run.fit()
    expected_run, expected_result, expected_task = unbroken
    assert is_equal(task, expected_task)
    assert result == expected_result
    assert run.records() == expected_run.records()
    assert run.ledger_path.read_bytes() == expected_run.ledger_path.read_bytes()


def test_a_run_may_be_killed_again_and_again(
    unbroken: tuple[Run, TrainingResult, ToyTask], tmp_path: Path
) -> None:
    run = Run(tmp_path / "killed")
    for killed_before in (2, 5, 5, 8):
        with pytest.raises(Killed):
            run.fit(killed_before=killed_before)
    _, task = run.fit()
    assert is_equal(task, unbroken[2])
    assert run.records() == unbroken[0].records()
    assert run.ledger() == unbroken[0].ledger()


def test_the_log_proves_what_was_trained_on_though_a_run_was_killed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.fit(killed_before=5)
    run.fit()
    report = run.store.check_ledger(lambda _: None)
    assert report.problems == []
    assert (report.step, report.positions) == (8, 48)
    assert [epoch["images"] for epoch in report.epochs] == [20, 20, 8]


def test_a_loader_that_gives_other_positions_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_of = toy_training.report_of
    monkeypatch.setattr(toy_training, "report_of", lambda step: report_of(step + 1))
    run = Run(tmp_path)
    with pytest.raises(DataError, match=r"the loaders gave positions 6 to 24 .* expected 0 to 18"):
        run.fit()
    assert run.store.list_commits() == []


def test_the_ledger_has_a_line_for_every_replaced_slot_in_order(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    run, _, _ = unbroken
    ledger = run.ledger()
    assert ledger[0] == {
        "step": 2,
        "slot": 7,
        "shard": "s.tar",
        "key": "k7",
        "replacement_key": "r",
        "reason": "torn",
    }
    assert [record["slot"] for record in ledger] == [7, 9, 12, 18, 19, 40]
    assert [record["step"] for record in ledger] == [2, 2, 3, 4, 4, 7]


def test_the_ledger_is_published_before_the_checkpoint_that_it_leads_to(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    # The checkpoints are of steps 3, 6 and 8; only every second step is logged.
    assert unbroken[0].published_ledgers == [
        [7, 9, 12],
        [7, 9, 12, 18, 19],
        [7, 9, 12, 18, 19, 40],
    ]


def test_metrics_count_the_damaged_samples_so_far(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    records = read_records(unbroken[0].metrics_path)
    counts = metric_series(records, "train/damaged_samples")
    assert counts == ([2, 4, 6, 8], [2, 5, 5, 6])
    # All six steps' images are counted once, although a checkpoint lies between two records.
    steps, hits = metric_series(records, "train/cache_hit_fraction")
    assert (steps, hits) == ([2, 4, 6, 8], [0.0] * 4)
    retries = metric_series(records, "train/storage_retries")
    assert retries == ([2, 4, 6, 8], [1, 1, 1, 1])
    assert all(
        record["train/read_bytes_per_s"] > 0 for record in records if "toy/loss/total" in record
    )


def test_the_loader_is_closed_when_training_ends(tmp_path: Path) -> None:
    class Failing(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            if step == 4:
                raise Killed
            return super().train_step(micro_batches, step)

    run = Run(tmp_path)
    with pytest.raises(Killed) as caught:
        run.fit(task=Failing(run.config, ToyConfig()))
    # The error still holds the frames of training, and all that they refer to.
    assert caught.tb is not None
    assert run.is_closed
    run.fit()
    assert run.is_closed


def test_hooks_are_called_at_their_moments_and_ended_after_an_error(tmp_path: Path) -> None:
    # Steps 2, 4 are logged, 3 is evaluated and saved.
    run, killed, resumed = Run(tmp_path), Moments(), Moments()
    run.hooks = [killed]
    with pytest.raises(Killed):
        run.fit(killed_before=5)
    first = [("step", 1), ("step", 2), ("collect", 2), ("record", 2)]
    second = [("step", 3), ("collect", 3), ("record", 3), ("save", 3)]
    last = [("step", 4), ("collect", 4), ("record", 4)]
    assert killed.seen == [("start", 0), *first, *second, *last, ("end", 0)]
    run.hooks = [resumed]
    run.fit()
    assert resumed.seen[:2] == [("start", 3), ("step", 4)]
    # The last step is logged, evaluated and saved.
    ending = ["step", "collect", "record", "record", "save"]
    assert resumed.seen[-6:] == [*((name, 8) for name in ending), ("end", 0)]


def test_hooks_are_ended_although_one_cannot_start(tmp_path: Path) -> None:
    class Broken(Moments):
        def start(self, first_step: int) -> None:
            raise DataError("no such folder")

    run, before, broken, after = Run(tmp_path), Moments(), Broken(), Moments()
    run.hooks = [before, broken, after]
    with pytest.raises(DataError, match="no such folder"):
        run.fit()
    assert before.seen == [("start", 0), ("end", 0)]
    assert broken.seen == [("end", 0)]
    assert after.seen == []


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.fit(killed_before=6)
    _, task = run.fit()
    assert task.steps_done == [4, 5, 6, 7, 8]


def test_a_finished_run_is_not_trained_again(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    run, result, _ = unbroken
    records = read_records(run.metrics_path)
    again, task = run.fit()
    assert task.steps_done == []
    assert again == result
    assert read_records(run.metrics_path) == records


def test_it_logs_evaluates_and_saves_when_it_is_told_and_at_the_end(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    run, result, _ = unbroken
    records = run.records()
    logged = [record["step"] for record in records if "toy/loss/total" in record]
    evaluated = [record["step"] for record in records if "toy/validation/norm" in record]
    assert logged == [2, 4, 6, 8]
    assert evaluated == [3, 6, 8]
    assert {record["images_seen"] for record in records} == {6 * step for step in (2, 3, 4, 6, 8)}
    assert [commit.step for commit in run.store.list_commits()] == [3, 6, 8]
    assert result.step == 8
    assert result.metrics["toy/validation/norm"] == records[-1]["toy/validation/norm"]


def test_a_checkpoint_says_what_it_belongs_to(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    run, result, _ = unbroken
    loaded = run.store.load_latest()
    assert loaded is not None
    state = dict(loaded.manifest.state)
    assert len(state.pop("gradient_norms")["toy/gradient_norm"]) == 8
    assert state == {"images_seen": 48, "seed": 0}
    assert loaded.manifest.config == {"width": 3, "depth": 1}
    assert loaded.manifest.dataset_id == DATASET_ID
    assert loaded.manifest.metrics == result.metrics


def test_metrics_are_published_before_the_checkpoint_that_they_lead_to(
    unbroken: tuple[Run, TrainingResult, ToyTask],
) -> None:
    run, _, _ = unbroken
    newest = [records[-1]["step"] for _, records in run.published]
    assert newest == [3, 6, 8]
    assert all(
        step not in committed for step, (committed, _) in zip(newest, run.published, strict=True)
    )


def test_another_architecture_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit()
    with pytest.raises(CheckpointError, match=r"step 8 .* another architecture \(depth differ\)"):
        run.fit(architecture=ToyConfig(depth=2))


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.fit()
    with pytest.raises(CheckpointError, match="trained on dataset dddddddddddd, not eeeeeeeeeeee"):
        run.fit(dataset_id="e" * 64)


def test_it_says_where_it_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.fit(killed_before=5)
    with caplog.at_level(logging.INFO):
        run.fit()
    assert "resumed at step 3 of 8" in caplog.text
    assert "step 6: validation/norm" in caplog.text


def test_a_damaged_checkpoint_is_stepped_over_to_the_same_bits(
    unbroken: tuple[Run, TrainingResult, ToyTask], tmp_path: Path
) -> None:
    run = Run(tmp_path / "killed")
    with pytest.raises(Killed):
        run.fit(killed_before=8)
    (newest,) = (tmp_path / "killed" / PREFIX).glob("step-00000006/*/toy.*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    _, task = run.fit()
    assert task.steps_done == [4, 5, 6, 7, 8]
    assert is_equal(task, unbroken[2])
    assert run.records() == unbroken[0].records()


def test_a_resumed_run_reads_its_checkpoint_once(
    unbroken: tuple[Run, TrainingResult, ToyTask], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        Run(tmp_path).fit(killed_before=8)
    storage, counted = count_reads(tmp_path)
    _, task = Run(tmp_path, storage).fit()
    sizes = [path.stat().st_size for path in (tmp_path / PREFIX).glob("step-00000006/*/*.safe*")]
    assert 0 < counted.num_bytes() <= sum(sizes)
    assert is_equal(task, unbroken[2])


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    class Exploding(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            if step == 5:
                micro_batches = [batch * float("inf") for batch in micro_batches]
            return super().train_step(micro_batches, step)

    run = Run(tmp_path, anomalies=AnomalyConfig(on_not_finite="stop"))
    task = Exploding(run.config, ToyConfig())
    with pytest.raises(
        NumericsError,
        match=r"step 5: toy/loss/total, toy/gradient_norm is not finite.*of step 3",
    ):
        run.fit(task=task)
    loaded = run.store.load_latest()
    assert loaded is not None
    assert loaded.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in loaded.read("toy").values())


def test_a_metric_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Silent(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            values = super().train_step(micro_batches, step)
            return values | {"toy/extra": torch.tensor(float("nan"))}

    run = Run(tmp_path)
    with pytest.raises(NumericsError, match="step 2: toy/extra is not finite"):
        run.fit(task=Silent(run.config, ToyConfig()))


def test_an_attempt_that_was_superseded_stops_and_commits_nothing_more(tmp_path: Path) -> None:
    run = Run(tmp_path)

    class Overtaken(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            if step == 5:
                Run(tmp_path).fit()  # somebody else resumes from step 3 and finishes
            return super().train_step(micro_batches, step)

    with pytest.raises(CheckpointError, match="newer attempt"):
        run.fit(task=Overtaken(run.config, ToyConfig()))
    commits = run.store.list_commits()
    assert [commit.step for commit in commits] == [3, 6, 8]
    # Whether step 3 was committed before the other came is a matter of time; nothing after it was.
    assert commits[1].attempt == commits[2].attempt


def test_a_failed_save_ends_the_run_long_before_the_next_save(tmp_path: Path) -> None:
    class FullDisk(Storage):
        failed = threading.Event()

        def write_bytes(self, path: str, data: bytes) -> None:
            if "step-00000500" in path:
                self.failed.set()
                raise DataError(f"{path}: no space left")
            super().write_bytes(path, data)

        def child(self, path: str) -> FullDisk:
            return FullDisk(super().child(path).root)

    class Patient(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            if step > 500:
                assert FullDisk.failed.wait(60)
            return super().train_step(micro_batches, step)

    run = Run(
        tmp_path,
        FullDisk(tmp_path),
        steps=1000,
        log_every=1000,
        evaluate_every=1000,
        checkpoint=CheckpointConfig(every=500),
    )
    task = Patient(run.config, ToyConfig())
    with pytest.raises(DataError, match="no space left"):
        run.fit(task=task)
    assert 500 <= task.steps_done[-1] < 1000
    assert run.store.list_commits() == []


def test_the_first_state_depends_on_nothing_but_the_seed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first, second = ToyTask(run.config, ToyConfig()), ToyTask(run.config, ToyConfig())
    assert is_equal(first, second)
    second.train_step([torch.ones(2, 4)] * 3, 1)
    assert not is_equal(first, copy.copy(second))


@pytest.mark.parametrize(
    ("every_s", "steps"),
    [(None, [10, 12]), (30.0, [5, 10, 12]), (60.0, [8, 10, 12]), (1.0, [3, 6, 9, 10, 12])],
)
def test_a_checkpoint_is_made_by_time_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float | None, steps: list[int]
) -> None:
    run = Run(tmp_path, steps=12, checkpoint=CheckpointConfig(every=10, every_s=every_s))
    run.hooks = [SlowSteps(monkeypatch)]
    _, task = run.fit()
    assert [commit.step for commit in run.store.list_commits()] == steps
    plain = Run(tmp_path / "plain", steps=12)
    assert is_equal(task, plain.fit()[1])  # when it is saved changes nothing


class NoticeAt(TrainerHook):
    """Is given notice while a step runs."""

    def __init__(self, step: int) -> None:
        self.noticed_step = step

    def step(self, step: int) -> None:
        if step == self.noticed_step:
            NOTICES.give("SIGTERM")


def test_after_notice_a_step_is_saved_and_training_ends(tmp_path: Path) -> None:
    run = Run(tmp_path / "noticed", steps=12)
    run.hooks = [NoticeAt(4)]
    try:
        with pytest.raises(NoticeError, match=r"step 6 is committed.*SIGTERM"):
            run.fit()
    finally:
        NOTICES.clear()
    assert [commit.step for commit in run.store.list_commits()] == [3, 6]
    run.hooks = []
    _, task = run.fit()
    assert task.steps_done == [7, 8, 9, 10, 11, 12]
    assert is_equal(task, Run(tmp_path / "plain", steps=12).fit()[1])


def test_notice_in_the_last_step_lets_it_end(tmp_path: Path) -> None:
    run = Run(tmp_path, steps=5)
    run.hooks = [NoticeAt(3)]
    try:
        assert run.fit()[0].step == 5
    finally:
        NOTICES.clear()
