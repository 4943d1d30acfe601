from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine_settings
from support.records import read_records
from torch import Tensor, nn

from fqgan_dist.config import Config
from fqgan_dist.data.batches import LoadReport, Replacement, merge_reports
from fqgan_dist.errors import CheckpointError, DataError, NumericsError
from fqgan_dist.randomness import keyed_torch_rng, torch_generator
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metrics import MetricsFile, Record, metric_series
from fqgan_dist.telemetry.progress import track
from fqgan_dist.telemetry.published import PublishedRecords
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.config import (
    CheckpointConfig,
    ScheduleConfig,
    TrainingConfig,
)
from fqgan_dist.training.ema import ExponentialMovingAverage
from fqgan_dist.training.engine import accumulate
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.hooks import AccountForLoading, ShowProgress, TrainerHook, WriteMetrics
from fqgan_dist.training.schedule import compute_lr
from fqgan_dist.training.step_layout import Slot, StepLayout
from fqgan_dist.training.task import Parts
from fqgan_dist.training.trainer import Trainer, TrainingResult
from fqgan_dist.world import World

CPU = torch.device("cpu")
PREFIX = "toy/checkpoints"
DATASET_ID = "d" * 64
TIMES = {
    "time",
    "train/loader_wait_fraction",
    "train/images_per_s",
    "train/read_bytes_per_s",
    "train/storage_retries",
}
DAMAGED_POSITIONS = {2: [9, 7], 3: [12], 4: [18, 19], 7: [40]}
"""By step, of 6 samples each."""


class Killed(BaseException):
    """Stands for whatever ends a process; SIGKILL itself is in tests/integration."""


def report_of(step: int) -> LoadReport:
    """What a loader tells of a step's batches."""
    replacements = [
        Replacement(
            position=position, shard="s.tar", key=f"k{position}", replacement_key="r", reason="torn"
        )
        for position in DAMAGED_POSITIONS.get(step, [])
    ]
    return merge_reports(
        [
            LoadReport(
                replacements=tuple(replacements), samples_read=6, bytes_read=600, retries=step % 2
            )
        ]
    )


class ToyConfig(Config):
    width: int = 3
    depth: int = 1


class ToyTask:
    """A linear model with dropout and an average: small, but with every kind of state."""

    def __init__(self, training: TrainingConfig, architecture: ToyConfig) -> None:
        self.architecture = architecture
        self.training = training
        torch.manual_seed(5)
        module = nn.Sequential(nn.Linear(4, architecture.width), nn.Dropout(0.5))
        layout = StepLayout.of(training, World())
        self.engine = PlainEngine(module, engine_settings(name="toy", layout=layout))
        self.ema = ExponentialMovingAverage(self.engine.local_parameters(), 0.9)
        self.steps_done: list[int] = []

    def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        def loss_fn(slot: Slot, batch: Tensor) -> tuple[Tensor, Tensor]:
            with keyed_torch_rng(0, step, slot.micro_batch, device=CPU):
                loss = self.engine.forward(batch).square().mean()
            return loss, loss.detach().reshape(1)

        rows = accumulate(self.engine, micro_batches, loss_fn)
        lr = compute_lr(self.training.schedule, step, self.training.steps)
        norm = self.engine.step(lr=lr, losses=rows)
        self.ema.update(self.engine.local_parameters())
        self.steps_done.append(step)
        return {"toy/loss/total": rows.mean(), "toy/gradient_norm": norm}

    def raise_if_not_finite(self) -> None:
        self.engine.raise_if_not_finite()

    def evaluate(self, step: int) -> dict[str, float]:
        with self.engine.whole_weights(self.ema.state_dict()) as module:
            weight = module.state_dict()["0.weight"]
            return {"toy/validation/norm": float(weight.norm())}

    def state_dict(self) -> Parts:
        state = self.engine.state_dict()
        return {
            "toy": state["weights"],
            "toy_optimizer": state["optimizer"],
            "toy_ema": self.engine.share(self.ema.state_dict()),
        }

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.engine.load_state_dict({"weights": parts["toy"], "optimizer": parts["toy_optimizer"]})
        self.ema.load_state_dict(self.engine.localize(parts["toy_ema"]))


class Run:
    """One run directory; `fit` is one session in it."""

    def __init__(self, root: Path, storage: Storage | None = None, **changes: Any) -> None:
        self.files = Storage(root)
        self.metrics_path = root / "files" / "metrics.jsonl"
        self.ledger_path = root / "files" / "damaged_samples.jsonl"
        values: dict[str, Any] = {
            "steps": 8,
            "global_batch_size": 6,
            "micro_batch_size": 2,
            "schedule": ScheduleConfig(lr=0.05, kind="cosine", warmup_steps=2),
            "log_every": 2,
            "evaluate_every": 3,
            "evaluation_samples": 1,
            "checkpoint": CheckpointConfig(every=3),
        }
        self.config = TrainingConfig.model_validate(values | changes)
        self.store = CheckpointStore(storage or Storage(root), PREFIX)
        self.published: list[tuple[list[int], list[Record]]] = []
        self.published_ledgers: list[list[int]] = []
        self.hooks: list[TrainerHook] = []

    def fit(
        self,
        *,
        killed_before: int | None = None,
        architecture: ToyConfig | None = None,
        dataset_id: str = DATASET_ID,
        task: ToyTask | None = None,
    ) -> tuple[TrainingResult, ToyTask]:
        task = task or ToyTask(self.config, architecture or ToyConfig())

        loaded: list[LoadReport] = []
        self.is_closed = False

        def batches(first_step: int) -> Generator[list[Tensor], None, None]:
            try:
                for step in range(first_step + 1, 10**6):
                    if step == killed_before:
                        raise Killed
                    loaded.append(report_of(step))
                    yield [
                        torch.randn(2, 4, generator=torch_generator(step, index))
                        for index in task.engine.layout.micro_batches
                    ]
            finally:
                self.is_closed = True

        def take_report() -> LoadReport:
            report = merge_reports(loaded)
            loaded.clear()
            return report

        loading = AccountForLoading(
            take_report,
            PublishedRecords(self.files, "files/damaged_samples.jsonl"),
            world=World(),
            global_batch_size=self.config.global_batch_size,
        )
        metrics = WriteMetrics([MetricsFile(self.files, "files/metrics.jsonl")])
        with track(self.config.steps, "training the toy", "steps") as bar:
            trainer = Trainer(
                task,
                batches,
                self.config,
                store=self.store,
                dataset_id=dataset_id,
                world=World(),
                hooks=[ShowProgress(bar), loading, metrics, Publication(self), *self.hooks],
            )
            return trainer.fit(), task

    def records(self) -> list[Record]:
        return [
            {name: value for name, value in record.items() if name not in TIMES}
            for record in read_records(self.metrics_path)
        ]

    def ledger(self) -> list[Record]:
        return read_records(self.ledger_path)

    def note_publication(self) -> None:
        self.published_ledgers.append([record["slot"] for record in self.ledger()])
        steps = [commit.step for commit in self.store.list_commits()]
        self.published.append((steps, read_records(self.metrics_path)))


class Publication(TrainerHook):
    """Notes what the files hold when a checkpoint is about to be committed."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def save(self, step: int) -> None:
        self.run.note_publication()


class Moments(TrainerHook):
    """Notes when the trainer calls it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def start(self, first_step: int) -> None:
        self.seen.append(("start", first_step))

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


def is_equal(one: ToyTask, other: ToyTask) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[part][name])
        for part, tensors in left.items()
        for name, tensor in tensors.items()
    )


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
    assert loaded.manifest.state == {"images_seen": 48, "seed": 0}
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


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    class Exploding(ToyTask):
        def train_step(self, micro_batches: Sequence[Tensor], step: int) -> dict[str, Tensor]:
            if step == 5:
                micro_batches = [batch * float("inf") for batch in micro_batches]
            return super().train_step(micro_batches, step)

    run = Run(tmp_path)
    task = Exploding(run.config, ToyConfig())
    with pytest.raises(NumericsError, match="toy: a loss or gradient is not finite"):
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
