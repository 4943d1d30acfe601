"""What both training stages share: checkpoints, metrics, the loop."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.data.batches import CodeBatch, ImageBatch, LoadReport
from fqgan_dist.data.consumption import OrderId
from fqgan_dist.loss_group import LossGroup
from fqgan_dist.recovery import RECOVERY
from fqgan_dist.stages.run import wait_for_ranks
from fqgan_dist.stages.shards import DatasetIds
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.training_task import TrainingTask
from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.metrics import MetricsFile
from fqgan_dist.telemetry.observer import LocalObserver, ObserverSink
from fqgan_dist.telemetry.optional_sinks import build_sinks
from fqgan_dist.telemetry.sessions import SessionRecords
from fqgan_dist.training.checkpoint import CheckpointStore, LoadedCheckpoint
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.hooks import (
    AccountForLoading,
    MarkSaves,
    ShowProgress,
    TellRecovery,
    WriteMetrics,
    mark_steps,
)
from fqgan_dist.training.named_tensors import copy_named_tensors
from fqgan_dist.training.trainer import Trainer, TrainingResult
from fqgan_dist.training.writer_process import WriterProcess
from fqgan_dist.weights.tensors import hash_tensors

BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)

# Settings of a training that move no weight (beyond the order in which ranks' gradients are
# summed): they may change between sessions of a run.
UNDECISIVE = {
    "log_every",
    "evaluate_every",
    "evaluation_samples",
    "checkpoint",
    "anomalies",
    "ranks_per_micro_batch",
    "engine",
    "zero_stage",
}


def training_settings(training: TrainingConfig) -> dict[str, Any]:
    return training.model_dump(mode="json", exclude=UNDECISIVE)


def checkpoint_store(context: RunContext, stage: str, training: TrainingConfig) -> CheckpointStore:
    """Name the checkpoints of a stage that trains, written by processes of their own."""
    return CheckpointStore(
        context.storage_of(stage),
        f"{stage}/checkpoints",
        retention=training.checkpoint.retention,
        make_writer=WriterProcess,
    )


class Loader(Protocol[BatchT_co]):
    """Gives a rank its micro-batches of every step."""

    def batches(
        self, start_step: int, micro_batches: Sequence[int], *, loss_group: LossGroup
    ) -> Generator[Sequence[BatchT_co], None, None]:
        """Yield some micro-batches of every step from `start_step` on."""
        ...

    @property
    def order_id(self) -> OrderId:
        """What decides the order of samples."""
        ...

    def take_report(self) -> LoadReport:
        """Tell what was done for the batches handed out since the last call."""
        ...


def run_training(
    context: RunContext, task: TrainingTask[Any, BatchT], loader: Loader[BatchT]
) -> TrainingResult:
    """Train a task from its newest checkpoint to the end; every rank calls it."""
    stage, training, layout, world = task.stage, task.training, task.layout, context.world

    def batches(first_step: int) -> Generator[Sequence[BatchT], None, None]:
        loaded = loader.batches(first_step, layout.micro_batches, loss_group=layout.loss_group)
        return mark_steps(loaded, first_step)

    ledger = SessionRecords(context.storage, f"{stage}/damaged_samples.jsonl")
    loading = AccountForLoading(
        loader.take_report,
        ledger if world.is_main else None,
        order=loader.order_id,
        world=world,
        global_batch_size=training.global_batch_size,
    )
    # One rank speaks for all; the other ranks' progress goes to their log files.
    observer = context.observer if world.is_main else LocalObserver(has_bar=False)
    sinks = _build_sinks(context, stage) if world.is_main else []
    of_main = [TellRecovery(RECOVERY, stage=stage)] if world.is_main else []
    with (
        _deterministic_kernels(training.deterministic),
        ACTIVITY.during("the start of training"),
        observer.track(training.steps, f"training the {stage}", "steps") as bar,
    ):
        trainer = Trainer(
            task,
            batches,
            training,
            store=checkpoint_store(context, stage, training),
            dataset_id=context.read(DatasetIds).train,
            world=world,
            name_images=_name_images,
            hooks=[*of_main, MarkSaves(), ShowProgress(bar), loading, WriteMetrics(sinks)],
        )
        result = trainer.fit()
    with ACTIVITY.during("the end of training"):
        # The main rank returns when its last checkpoint is committed, and all ranks read that next.
        wait_for_ranks(world)
    return result


def _name_images(batch: object) -> tuple[int, list[str]]:
    assert isinstance(batch, ImageBatch | CodeBatch), f"a batch of {type(batch).__name__}"
    return batch.micro_batch, batch.keys


def _build_sinks(context: RunContext, stage: str) -> list[MetricSink]:
    """List what takes the metrics: the file first, then whoever may fail."""
    run = TrackedRun(storage=context.storage, stage=stage, name=context.config.name)
    return [
        MetricsFile(context.storage, f"{stage}/metrics.jsonl"),
        ObserverSink(context.observer, stage),
        *build_sinks(context.config.telemetry.sinks, run),
    ]


def hash_weights(context: RunContext, stage: str, training: TrainingConfig, step: int) -> str:
    # Not a checkpoint's own id: that names the attempt, which differs between equal runs.
    part = _weights_part(stage, training)
    store = checkpoint_store(context, stage, training)
    tensors = store.read_newest(lambda loaded: loaded.read(part), step=step)
    assert tensors is not None, "read_newest raises when a step is named and missing"
    return hash_tensors(tensors)


def load_weights(
    module: nn.Module, context: RunContext, stage: str, training: TrainingConfig, step: int
) -> None:
    """Copy a finished stage's weights into a module: the averaged ones if there are any.

    Raises:
        CheckpointError: the checkpoint is damaged or of another architecture.
    """
    part = _weights_part(stage, training)

    def read(loaded: LoadedCheckpoint) -> dict[str, Tensor]:
        # An average covers parameters, not buffers.
        others = loaded.tensor_shapes(stage).keys() - loaded.tensor_shapes(part).keys()
        return loaded.read(part) | (loaded.read(stage, others) if others else {})

    tensors = checkpoint_store(context, stage, training).read_newest(read, step=step)
    assert tensors is not None, "read_newest raises when a step is named and missing"
    copy_named_tensors(tensors, module.state_dict(), what=f"{part} of step {step}")


@contextmanager
def _deterministic_kernels(is_wanted: bool) -> Iterator[None]:
    # For the block only: sampling, for one, uses kernels that have no deterministic twin.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(is_wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _weights_part(stage: str, training: TrainingConfig) -> str:
    return f"{stage}_ema" if training.ema_decay else stage
