"""What both training stages share: checkpoints, metrics, the loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import nn

from fqgan_dist.data.batches import LoadReport
from fqgan_dist.stages.run import wait_for_ranks
from fqgan_dist.stages.shards import DatasetIds
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import JsonLinesWriter
from fqgan_dist.telemetry.metrics import MetricsWriter
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.named_tensors import copy_named_tensors
from fqgan_dist.training.task import Task
from fqgan_dist.training.trainer import Trainer, TrainingResult
from fqgan_dist.weights.tensors import hash_tensors

BatchT = TypeVar("BatchT")

UNDECISIVE = {
    "log_every",
    "evaluate_every",
    "evaluation_samples",
    "checkpoint",
    "ranks_per_micro_batch",
    "engine",
    "zero_stage",
}
"""Settings of a training that move no weight (beyond the order in which ranks' gradients are
summed): they may change between sessions of a run."""


def training_settings(training: TrainingConfig) -> dict[str, Any]:
    """Return the settings that decide the weights."""
    return training.model_dump(mode="json", exclude=UNDECISIVE)


def checkpoint_store(context: RunContext, stage: str, training: TrainingConfig) -> CheckpointStore:
    """Open a stage's checkpoints."""
    return CheckpointStore(
        context.storage_of(stage),
        f"{stage}/checkpoints",
        retention=training.checkpoint.retention,
    )


def run_training(
    context: RunContext,
    stage: str,
    task: Task[BatchT],
    batches: Callable[[int], Generator[Sequence[BatchT], None, None]],
    take_report: Callable[[], LoadReport],
    training: TrainingConfig,
) -> TrainingResult:
    """Train a task from its newest checkpoint to the end; every rank calls it."""
    # One rank speaks for all; the other ranks' progress goes to their log files.
    observer = context.observer if context.world.is_main else LocalObserver(has_bar=False)
    with (
        _deterministic_kernels(training.deterministic),
        MetricsFile(context.storage, stage, observer) as metrics,
        LedgerFile(context.storage, f"{stage}/damaged_samples.jsonl") as ledger,
        observer.track(training.steps, f"training the {stage}", "steps") as bar,
    ):

        def publish_files() -> None:
            metrics.publish()
            ledger.publish()

        trainer = Trainer(
            task,
            batches,
            training,
            store=checkpoint_store(context, stage, training),
            dataset_id=context.read(DatasetIds).train,
            world=context.world,
            take_report=take_report,
            open_metrics=metrics.open if context.world.is_main else None,
            open_ledger=ledger.open if context.world.is_main else None,
            publish_files=publish_files,
            progress=bar,
        )
        result = trainer.fit()
    # The main rank returns when its last checkpoint is committed, and all ranks read that next.
    wait_for_ranks(context.world)
    return result


def hash_weights(context: RunContext, stage: str, training: TrainingConfig, step: int) -> str:
    """Digest the weights that a finished training hands on, equal for equal runs.

    A checkpoint's own id is of no use here: it names the attempt, which differs between runs.
    """
    loaded = checkpoint_store(context, stage, training).load_latest(step=step)
    assert loaded is not None, "load_latest raises when a step is named and missing"
    return hash_tensors(loaded.read(_weights_part(stage, training)))


def load_weights(
    module: nn.Module, context: RunContext, stage: str, training: TrainingConfig, step: int
) -> None:
    """Copy a finished stage's weights into a module: the averaged ones if there are any.

    Raises:
        CheckpointError: the checkpoint is damaged or of another architecture.
    """
    loaded = checkpoint_store(context, stage, training).load_latest(step=step)
    assert loaded is not None, "load_latest raises when a step is named and missing"
    part = _weights_part(stage, training)
    tensors = loaded.read(stage) | loaded.read(part)  # an average covers parameters, not buffers
    copy_named_tensors(tensors, module.state_dict(), what=f"{part} of step {step}")


@contextmanager
def _deterministic_kernels(is_wanted: bool) -> Iterator[None]:
    """Choose torch's kernels for a block; sampling, for one, uses some that have no such twin."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _weights_part(stage: str, training: TrainingConfig) -> str:
    return f"{stage}_ema" if training.ema_decay else stage


class _PublishedFile(ExitStack):
    """A file that is appended to locally and published to the run's storage."""

    def __init__(self, storage: Storage, path: str) -> None:
        super().__init__()
        self.storage = storage
        self.path = path
        local = storage.local_path(path)
        self._is_remote = local is None
        if local is None:
            local = (
                Path(self.enter_context(tempfile.TemporaryDirectory())) / PurePosixPath(path).name
            )
        self.local = local
        self._writer: JsonLinesWriter | MetricsWriter | None = None

    def fetch(self) -> None:
        """Bring what a former session published; its writer removes what is not of this run."""
        if self._is_remote and self.storage.exists(self.path):
            self.local.write_bytes(self.storage.read_bytes(self.path))

    def publish(self) -> None:
        """Bring what was written to the disk, and to the storage where that is elsewhere."""
        if self._writer is not None:
            self._writer.flush()  # TensorBoard's events wait for two minutes otherwise
        if not self._is_remote:
            return
        folder = PurePosixPath(self.path).parent
        for file in sorted(self.local.parent.rglob("*")):
            if file.is_file():
                name = file.relative_to(self.local.parent).as_posix()
                self.storage.write_bytes(f"{folder}/{name}", file.read_bytes())


class LedgerFile(_PublishedFile):
    """The ledger of damaged samples: a line for each slot whose sample was replaced."""

    def open(self, resumed_step: int) -> JsonLinesWriter:
        """Open the file as it was after a step."""
        self.fetch()
        self._writer = JsonLinesWriter(self.local, resumed_step=resumed_step)
        return self._writer


class MetricsFile(_PublishedFile):
    """The metrics of a stage, and TensorBoard's files beside it."""

    def __init__(self, storage: Storage, stage: str, observer: Observer) -> None:
        """Choose the place of the file.

        Args:
            storage: the run's storage.
            stage: the stage that trains.
            observer: is told every record.
        """
        super().__init__(storage, f"{stage}/metrics.jsonl")
        self.on_write = partial(observer.record_metrics, stage)

    def open(self, resumed_step: int) -> MetricsWriter:
        """Open the file as it was after a step."""
        self.fetch()
        self._writer = MetricsWriter(
            self.local, resumed_step=resumed_step, tensorboard=True, on_write=self.on_write
        )
        return self._writer
