"""A small training with every kind of state, and runs of it that may be killed."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.engines import engine_settings
from support.records import read_records
from torch import Tensor, nn

from fqgan_dist.config import Config
from fqgan_dist.data.batches import LoadReport, Replacement, merge_reports
from fqgan_dist.data.consumption import Consumed, OrderId, consume
from fqgan_dist.randomness import keyed_torch_rng, torch_generator
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metrics import MetricsFile, Record
from fqgan_dist.telemetry.progress import track
from fqgan_dist.telemetry.sessions import SessionRecords
from fqgan_dist.training.anomalies import Evidence
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
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
ORDER = OrderId(dataset_id=DATASET_ID, num_samples=20, seed=0, window_shards=1)
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
                replacements=tuple(replacements),
                consumed=(consume_of(step),),
                samples_read=6,
                bytes_read=600,
                retries=step % 2,
            )
        ]
    )


def consume_of(step: int) -> Consumed:
    """Account for a step's six samples, of shard 0 and in order."""
    first = 6 * (step - 1)
    samples = np.array([[0, position] for position in range(first, first + 6)])
    return consume(first, samples, samples)


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
        self.evidence = [Evidence(["toy/loss/total"], rows, "toy/gradient_norm", norm)]
        self.ema.update(self.engine.local_parameters())
        self.steps_done.append(step)
        return {"toy/loss/total": rows.mean(), "toy/gradient_norm": norm}

    def take_evidence(self) -> list[Evidence]:
        return self.evidence

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

    def needed_state(self) -> Mapping[str, Needs]:
        needs = self.engine.needed_state()
        return {"toy": needs["weights"], "toy_optimizer": needs["optimizer"]}

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
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

        names: dict[int, tuple[int, list[str]]] = {}

        def batches(first_step: int) -> Generator[list[Tensor], None, None]:
            try:
                for step in range(first_step + 1, 10**6):
                    if step == killed_before:
                        raise Killed
                    loaded.append(report_of(step))
                    made = [
                        torch.randn(2, 4, generator=torch_generator(step, index))
                        for index in task.engine.layout.micro_batches
                    ]
                    for index, batch in enumerate(made):
                        names[id(batch)] = index, [f"{step}-{index}-{row}" for row in range(2)]
                    yield made
            finally:
                self.is_closed = True

        def name_images(batch: Tensor) -> tuple[int, list[str]]:
            return names[id(batch)]

        def take_report() -> LoadReport:
            report = merge_reports(loaded)
            loaded.clear()
            return report

        loading = AccountForLoading(
            take_report,
            SessionRecords(self.files, "files/damaged_samples.jsonl"),
            order=ORDER,
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
                name_images=name_images,
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
        has_metrics = self.metrics_path.exists()
        self.published.append((steps, read_records(self.metrics_path) if has_metrics else []))


class Publication(TrainerHook):
    """Notes what the files hold when a checkpoint is about to be committed."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def save(self, step: int) -> None:
        self.run.note_publication()


def is_equal(one: ToyTask, other: ToyTask) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[part][name])
        for part, tensors in left.items()
        for name, tensor in tensors.items()
    )
