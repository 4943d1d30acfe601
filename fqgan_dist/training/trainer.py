"""The training loop: when to step, log, evaluate and save; what is trained is the task's."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor

from fqgan_dist.errors import CheckpointError, NoticeError, NumericsError
from fqgan_dist.notice import NOTICES
from fqgan_dist.telemetry.sessions import Session
from fqgan_dist.training.agreement import StepAgreement, Wishes
from fqgan_dist.training.anomalies import (
    DEVICE_LAG,
    NO_CHECKPOINT,
    Anomaly,
    AnomalyPolicy,
    AnomalyWatch,
)
from fqgan_dist.training.checkpoint import CheckpointStore, LoadedCheckpoint
from fqgan_dist.training.checkpoint_attempt import Attempt
from fqgan_dist.training.clock import TrainingClock
from fqgan_dist.training.commit_log import Consumption
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.hooks import TrainerHook
from fqgan_dist.training.task import Parts, Task
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

BatchT = TypeVar("BatchT")
Batches = Callable[[int], Generator[Sequence[BatchT], None, None]]
"""Maps the number of finished steps to the stream of this rank's micro-batches that follow; closing
it ends what loads them."""


NameImages = Callable[[BatchT], tuple[int, list[str]]]
"""Gives the index in the global batch and the keys of the images of a micro-batch."""

_MOST_KEYS = 16
_MOST_MICRO_BATCHES = 4


class _RollbackError(Exception):
    """Training goes on from the newest checkpoint."""


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
        name_images: NameImages[BatchT] | None = None,
    ) -> None:
        """Hold what the loop needs; every rank has its own hooks and saves what it owns."""
        self.task = task
        self.batches = batches
        self.config = config
        self.store = store
        self.dataset_id = dataset_id
        self.world = world
        self.hooks = hooks
        self._name_images = name_images
        self._saved_at = time.monotonic()
        self._watch = AnomalyWatch(config.anomalies)
        self._policy = AnomalyPolicy(config.anomalies)
        self._images: deque[tuple[int, dict[int, list[str]]]] = deque(maxlen=DEVICE_LAG + 1)
        """Of the last steps: this rank's micro-batches and their images."""

    def fit(self) -> TrainingResult:
        """Train to the last step and return its evaluation.

        Raises:
            CheckpointError: the newest checkpoint belongs to another architecture or dataset.
            NumericsError: numbers went wrong, and `anomalies` says to stop.
            NoticeError: a rank was given notice of its end; what was done is committed.
        """
        while True:
            try:
                return self._fit_once()
            except _RollbackError as rollback:
                logger.warning("%s", rollback)

    def _fit_once(self) -> TrainingResult:
        # Beginning first fences off older attempts: none can commit between the load and our save.
        with self._begin_attempt() as attempt:
            loaded = self._load()
            first_step = loaded.step if loaded else 0
            self._watch.forget()
            if loaded:
                attempt.continue_from(loaded.number)
                self._watch.load_state(loaded.manifest.state.get("gradient_norms", {}))
            if loaded and first_step >= self.config.steps:
                attempt.rotate()
                return TrainingResult(step=first_step, metrics=loaded.manifest.metrics)
            session = Session(number=attempt.number, attempt=attempt.id, resumed_step=first_step)
            with ExitStack() as started:
                for hook in self.hooks:
                    started.callback(hook.end)
                    hook.start(session)
                if self._policy.num_rollbacks:
                    self._record(first_step, self._count_anomalies())
                batches = started.enter_context(closing(self.batches(first_step)))
                started.enter_context(NOTICES.heeded())
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
        agreement = StepAgreement(self.world)
        for step in range(first_step + 1, self.config.steps + 1):
            # A save that failed, or a newer attempt that took over, ends this one now.
            attempt.raise_pending()
            agreed = agreement.exchange(self._wishes())
            with clock.waiting():
                micro_batches = next(batches)
            values = self._train_step(micro_batches, step, attempt, agreement)
            for hook in self.hooks:
                hook.step(step)
            results = {}  # a checkpoint names the metrics of its own step only
            is_last = step == self.config.steps
            is_logged = is_last or step % self.config.log_every == 0
            is_saved = is_last or step % self.config.checkpoint.every == 0
            # What was wished when a save was under way is done.
            is_due = agreed.is_save_due and attempt.last_step != step - 1
            is_saved = is_saved or is_due or agreed.has_notice
            if is_logged or is_saved:
                self._answer(self._watch.drain(), step, attempt, agreement)
                for hook in self.hooks:
                    hook.collect(step)
            if is_logged:
                results |= self._log(step, values, clock)
            with clock.aside():
                if is_last or step % self.config.evaluate_every == 0:
                    results |= self._evaluate(step)
                if is_saved:
                    self._save(attempt, step, results)
            if agreed.has_notice and not is_last:
                self._leave(attempt, step, agreement)
        agreement.close()
        return TrainingResult(step=self.config.steps, metrics=results)

    def _train_step(
        self,
        micro_batches: Sequence[BatchT],
        step: int,
        attempt: Attempt,
        agreement: StepAgreement,
    ) -> Mapping[str, Tensor]:
        """Run a step, unless its images are left out, and look at the numbers of those before."""
        if (reason := self._policy.left_out.get(step)) is not None:
            self._note_skipped(step, reason, now=step)
            return {}
        if self._name_images is not None:
            self._images.append((step, dict(map(self._name_images, micro_batches))))
        values = self.task.train_step(micro_batches, step)
        self._watch.note(step, self.task.take_evidence())
        self._answer(self._watch.look(step), step, attempt, agreement)
        return values

    def _answer(
        self,
        anomalies: Sequence[Anomaly],
        step: int,
        attempt: Attempt,
        agreement: StepAgreement,
    ) -> None:
        """Do what the policy says; every rank comes here with the same anomalies."""
        for anomaly in anomalies:
            newest = self._find_newest_commit(attempt)
            answer, why = self._policy.answer(anomaly, has_checkpoint=newest is not None)
            text = f"{anomaly.describe()}; {self._find_images(anomaly)}; {why}"
            if self.world.is_main:
                logger.warning("%s", text)
            match answer:
                case "report":
                    self._record(step, {"train/spike_step": float(anomaly.step)})
                case "skip":
                    self._note_skipped(anomaly.step, anomaly.describe(), now=step)
                case "rollback":
                    agreement.close()
                    raise _RollbackError(f"{text}; going back to the checkpoint of step {newest}")
                case "stop":
                    kept = "" if NO_CHECKPOINT in why else f"; {NO_CHECKPOINT}"
                    if newest is not None:
                        kept = f"; the newest checkpoint is of step {newest}"
                    raise NumericsError(
                        f"{text}{kept}. Lower the learning rate, use precision: fp32, or look at "
                        "these images"
                    )

    def _find_newest_commit(self, attempt: Attempt) -> int | None:
        """Give the step of the newest checkpoint, None if there is none; the same on every rank."""
        attempt.wait()
        commits = self.store.list_commits() if self.world.is_main else []
        steps = [commits[-1].step if commits else None]
        if self.world.world_size > 1:
            dist.broadcast_object_list(steps, src=0)
        return steps[0]

    def _find_images(self, anomaly: Anomaly) -> str:
        """Say which rank had which images of an anomaly."""
        own = next((images for step, images in self._images if step == anomaly.step), {})
        found = {index: own[index] for index in anomaly.micro_batches if index in own}
        all_found: list[Any] = [found] * self.world.world_size
        if self.world.world_size > 1:
            dist.all_gather_object(all_found, found)
        named = [
            f"micro-batch {index} (rank {rank}): images {', '.join(keys[:_MOST_KEYS])}"
            + (f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else "")
            for rank, each in enumerate(all_found)
            for index, keys in sorted(each.items())
        ]
        more = len(named) - _MOST_MICRO_BATCHES
        named = named[:_MOST_MICRO_BATCHES] + ([f"and {more} more"] if more > 0 else [])
        return "; ".join(named) or "its images are not known"

    def _note_skipped(self, step: int, reason: str, *, now: int) -> None:
        for hook in self.hooks:
            hook.skip(step, reason)
        # At the present step: records are in the order of steps, and a later one may be there.
        self._record(now, self._count_anomalies())

    def _count_anomalies(self) -> dict[str, float]:
        return {
            "train/skipped_steps": float(self._policy.num_skipped),
            "train/rollbacks": float(self._policy.num_rollbacks),
        }

    def _wishes(self) -> Wishes:
        every_s = self.config.checkpoint.every_s
        is_due = every_s is not None and time.monotonic() - self._saved_at >= every_s
        # By the main rank's clock alone, so that a save does not come twice.
        return Wishes(
            is_save_due=is_due and self.world.is_main, has_notice=NOTICES.given() is not None
        )

    def _leave(self, attempt: Attempt, step: int, agreement: StepAgreement) -> NoReturn:
        """End before this process is ended, when what was done is committed."""
        attempt.wait()
        # The first rank that fails ends the others, the one that commits among them.
        agreement.wait_for_all()
        notice = NOTICES.given()
        reason = notice.reason if notice else "another rank was given notice"
        raise NoticeError(
            f"step {step} is committed, and training makes way: {reason}; the same command "
            "continues"
        )

    def _load(self) -> LoadedCheckpoint | None:
        """Restore the newest checkpoint in which every rank finds what it needs undamaged."""
        found = self.store.read_newest(self._read, world=self.world)
        return self._restore(*found) if found else None

    def _read(self, loaded: LoadedCheckpoint) -> tuple[LoadedCheckpoint, Parts]:
        self._require_same_run(loaded)
        return loaded, loaded.read_parts(self.task.needed_state())

    def _restore(self, loaded: LoadedCheckpoint, parts: Parts) -> LoadedCheckpoint:
        self.task.load_state_dict(parts)
        logger.info(
            "resumed at step %d of %d from %s; read %.1f MiB",
            loaded.step,
            self.config.steps,
            self.store,
            loaded.bytes_read / 2**20,
        )
        return loaded

    def _require_same_run(self, loaded: LoadedCheckpoint) -> None:
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

    def _log(
        self, step: int, values: Mapping[str, Tensor], clock: TrainingClock
    ) -> dict[str, float]:
        numbers = {name: value.item() for name, value in values.items()}
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if bad and step not in self._policy.left_out:
            raise NumericsError(f"step {step}: {', '.join(bad)} is not finite")
        elapsed_s, rates = clock.measure(step, self.config.global_batch_size)
        for hook in self.hooks:
            rates |= hook.measure(elapsed_s)
        self._record(step, numbers | rates)
        return {name: number for name, number in numbers.items() if math.isfinite(number)}

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
        self._saved_at = time.monotonic()
        self._policy.committed(step)
        state: dict[str, Any] = {
            "images_seen": step * self.config.global_batch_size,
            # All randomness is keyed by (seed, step, micro-batch), so the seed is the RNG state.
            "seed": self.config.seed,
            "gradient_norms": self._watch.state(),
        }
        # Before the commit: no checkpoint then has records missing that led to it.
        consumed: Consumption | None = None
        for hook in self.hooks:
            hook.save(step)
            consumed = hook.take_consumption(step) or consumed
        attempt.save(
            step,
            tensors=self.task.state_dict(),
            state=state,
            metrics=dict(metrics),
            config=self.task.architecture.model_dump(mode="json"),
            dataset_id=self.dataset_id,
            consumed=consumed,
        )
