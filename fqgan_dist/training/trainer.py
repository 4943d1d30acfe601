"""The training loop: when to step, log, evaluate and save; what is trained is the task's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from fqgan_dist.errors import CheckpointError, NumericsError
from fqgan_dist.training.checkpoint import CheckpointStore, LoadedCheckpoint
from fqgan_dist.training.checkpoint_attempt import Attempt
from fqgan_dist.training.clock import TrainingClock
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.hooks import TrainerHook
from fqgan_dist.training.task import Task
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")
Batches = Callable[[int], Generator[Sequence[BatchT], None, None]]
"""Maps the number of finished steps to the stream of this rank's micro-batches that follow; closing
it ends what loads them."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training leaves behind."""

    step: int
    metrics: dict[str, float]
    """Training and held-out metrics of the last step."""


class Trainer(Generic[BatchT]):
    """Drive a task from its newest checkpoint to its last step."""

    def __init__(
        self,
        task: Task[BatchT],
        batches: Batches[BatchT],
        config: TrainingConfig,
        *,
        store: CheckpointStore,
        dataset_id: str,
        world: World,
        hooks: Sequence[TrainerHook],
    ) -> None:
        """Hold what the loop needs; every rank has its own hooks and saves what it owns."""
        self.task = task
        self.batches = batches
        self.config = config
        self.store = store
        self.dataset_id = dataset_id
        self.world = world
        self.hooks = hooks

    def fit(self) -> TrainingResult:
        """Train to the last step and return its evaluation.

        Raises:
            CheckpointError: the newest checkpoint belongs to another architecture or dataset.
            NumericsError: a loss or gradient is not finite.
        """
        # Beginning first fences off older attempts: none can commit between the load and our save.
        with self._begin_attempt() as attempt:
            loaded = self._load()
            first_step = self._restore(loaded) if loaded else 0
            if loaded:
                attempt.continue_from(loaded.number)
            if loaded and first_step >= self.config.steps:
                return TrainingResult(step=first_step, metrics=loaded.manifest.metrics)
            with ExitStack() as started:
                for hook in self.hooks:
                    started.callback(hook.end)
                    hook.start(first_step)
                batches = started.enter_context(closing(self.batches(first_step)))
                return self._run_steps(first_step, batches, attempt)

    def _begin_attempt(self) -> Attempt:
        rank, world_size = self.world.rank, self.world.world_size
        attempt = self.store.begin_attempt(world_size=world_size) if self.world.is_main else None
        if world_size > 1:
            ids = [attempt.id if attempt else ""]
            dist.broadcast_object_list(ids, src=0)
            attempt = attempt or self.store.join_attempt(ids[0], rank=rank, world_size=world_size)
        assert attempt is not None, "one rank is the main rank"
        return attempt

    def _run_steps(
        self, first_step: int, batches: Iterator[Sequence[BatchT]], attempt: Attempt
    ) -> TrainingResult:
        clock = TrainingClock()
        results: dict[str, float] = {}
        for step in range(first_step + 1, self.config.steps + 1):
            # A save that failed, or a newer attempt that took over, ends this one now.
            attempt.raise_pending()
            with clock.waiting():
                micro_batches = next(batches)
            values = self.task.train_step(micro_batches, step)
            for hook in self.hooks:
                hook.step(step)
            results = {}  # a checkpoint names the metrics of its own step only
            is_last = step == self.config.steps
            is_logged = is_last or step % self.config.log_every == 0
            is_saved = is_last or step % self.config.checkpoint.every == 0
            if is_logged or is_saved:
                for hook in self.hooks:
                    hook.collect(step)
            if is_logged:
                results |= self._log(step, values, clock)
            with clock.aside():
                if is_last or step % self.config.evaluate_every == 0:
                    results |= self._evaluate(step)
                if is_saved:
                    self._save(attempt, step, results)
        return TrainingResult(step=self.config.steps, metrics=results)

    def _load(self) -> LoadedCheckpoint | None:
        # The main rank finds the newest good checkpoint, and all load that one.
        found = self.store.load_latest() if self.world.is_main else None
        if self.world.world_size == 1:
            return found
        numbers = [found.number if found else None]
        dist.broadcast_object_list(numbers, src=0)
        return found if found or numbers[0] is None else self.store.load(numbers[0])

    def _restore(self, loaded: LoadedCheckpoint) -> int:
        architecture = self.task.architecture.model_dump(mode="json")
        if loaded.manifest.config != architecture:
            changed = sorted(
                key
                for key in loaded.manifest.config.keys() | architecture.keys()
                if loaded.manifest.config.get(key) != architecture.get(key)
            )
            raise CheckpointError(
                f"{self.store}: step {loaded.step} was trained with another architecture "
                f"({', '.join(changed)} differ); use its config, or another storage.root"
            )
        if loaded.manifest.dataset_id != self.dataset_id:
            raise CheckpointError(
                f"{self.store}: step {loaded.step} was trained on dataset "
                f"{loaded.manifest.dataset_id[:12]}, not {self.dataset_id[:12]}; use its data, or "
                f"another storage.root"
            )
        self.task.load_state_dict({name: loaded.read(name) for name in loaded.manifest.parts})
        logger.info("resumed at step %d of %d from %s", loaded.step, self.config.steps, self.store)
        return loaded.step

    def _log(
        self, step: int, values: Mapping[str, Tensor], clock: TrainingClock
    ) -> dict[str, float]:
        self.task.raise_if_not_finite()
        numbers = {name: value.item() for name, value in values.items()}
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if bad:
            raise NumericsError(f"step {step}: {', '.join(bad)} is not finite")
        elapsed_s, rates = clock.measure(step, self.config.global_batch_size)
        for hook in self.hooks:
            rates |= hook.measure(elapsed_s)
        self._record(step, numbers | rates)
        return numbers

    def _evaluate(self, step: int) -> dict[str, float]:
        values = self.task.evaluate(step)
        self._record(step, values)
        if self.world.is_main:
            shown = ", ".join(
                f"{name.split('/', 1)[-1]} {value:.4g}" for name, value in values.items()
            )
            logger.info("step %d: %s", step, shown)
        return values

    def _record(self, step: int, numbers: Mapping[str, float]) -> None:
        for hook in self.hooks:
            hook.record(step, numbers, images_seen=step * self.config.global_batch_size)

    def _save(self, attempt: Attempt, step: int, metrics: Mapping[str, float]) -> None:
        self.task.raise_if_not_finite()
        state: dict[str, Any] = {
            "images_seen": step * self.config.global_batch_size,
            # All randomness is keyed by (seed, step, micro-batch), so the seed is the RNG state.
            "seed": self.config.seed,
        }
        # Before the commit: no checkpoint then has records missing that led to it.
        for hook in self.hooks:
            hook.save(step)
        attempt.save(
            step,
            tensors=self.task.state_dict(),
            state=state,
            metrics=dict(metrics),
            config=self.task.architecture.model_dump(mode="json"),
            dataset_id=self.dataset_id,
        )
