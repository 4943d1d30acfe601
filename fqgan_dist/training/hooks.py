"""What happens beside a training: progress, the account of loading, metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from typing import TypeVar

import torch.distributed as dist

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.data.batches import LoadReport, merge_reports
from fqgan_dist.data.consumption import Consumed, OrderId, join
from fqgan_dist.errors import DataError
from fqgan_dist.recovery import Recovery
from fqgan_dist.telemetry.metric_sink import MetricSink
from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.telemetry.sessions import Session, SessionRecords
from fqgan_dist.training.commit_log import Consumption, SkippedStep, StandInRecord
from fqgan_dist.world import World

logger = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")


class TrainerHook:
    """Is called by the trainer at these moments, which pass without effect unless overridden.

    Hooks are called in the order of the trainer's list. Every rank has its own list: what makes
    ranks wait for each other must be in all of them.
    """

    def start(self, session: Session) -> None:
        """Begin: what former sessions did after `session.resumed_step` is void."""

    def step(self, step: int) -> None:
        """Note that a step was done; on most steps nothing else happens."""

    def collect(self, step: int) -> None:
        """Exchange what ranks know, before a step that is logged or saved."""

    def skip(self, step: int, reason: str) -> None:
        """Note that a step has moved no weight; it may be one of the last steps."""

    def measure(self, elapsed_s: float) -> Mapping[str, float]:  # noqa: ARG002
        """Add to the record of a step that is logged, `elapsed_s` seconds after the last."""
        return {}

    def record(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        """Take the metrics of a step, those of its evaluation in a record of their own."""

    def save(self, step: int) -> None:
        """Bring to the storage what the checkpoint that follows must not be without."""

    def take_consumption(self, step: int) -> Consumption | None:  # noqa: ARG002
        """Give what was trained on since the last save, for the commit; None: not this hook's."""
        return None

    def end(self) -> None:
        """Close what `start` opened, however far it came and however training ended."""


class ShowProgress(TrainerHook):
    """Advances a bar once a step, and puts it back where training goes back."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._done = 0

    def start(self, session: Session) -> None:
        self._bar.skip(session.resumed_step - self._done)
        self._done = session.resumed_step

    def step(self, step: int) -> None:
        self._bar.advance()
        self._done = step


class MarkSaves(TrainerHook):
    """Tells the watchdog of a save, which may wait for the one before."""

    def save(self, step: int) -> None:
        ACTIVITY.enter(f"the save of step {step}")


def mark_steps(
    batches: Generator[BatchT, None, None], first_step: int
) -> Generator[BatchT, None, None]:
    """Hand batches on, and tell the watchdog of each that is waited for, and of each step."""
    try:
        with closing(batches):
            ACTIVITY.begin_unit()
            ACTIVITY.enter(f"step {first_step + 1}, its batch", pace="steady", is_loading=True)
            for step, batch in enumerate(batches, first_step + 1):
                ACTIVITY.enter(f"step {step}", pace="steady")
                yield batch
                del batch  # its memory is used again
                ACTIVITY.end_unit()
                ACTIVITY.begin_unit()
                ACTIVITY.enter(f"step {step + 1}, its batch", pace="steady", is_loading=True)
    finally:
        ACTIVITY.enter("the end of training")


class AccountForLoading(TrainerHook):
    """Adds up what all ranks' loaders did, and keeps the ledger of damaged samples."""

    def __init__(
        self,
        take_report: Callable[[], LoadReport],
        ledger: SessionRecords | None,
        *,
        order: OrderId,
        world: World,
        global_batch_size: int,
    ) -> None:
        """Hold what is needed; every rank has one.

        `take_report` tells what this rank's loader did since the last call. The ledger gets a line
        for each slot whose sample was replaced; None on all but the main rank.
        """
        self._take_report = take_report
        self._ledger = ledger
        self._order = order
        self._world = world
        self._global_batch_size = global_batch_size
        self._unlogged = LoadReport()
        self._consumed: list[Consumed] = []
        self._skipped: dict[int, str] = {}
        self._saved_end = 0

    def start(self, session: Session) -> None:
        self._take_report()  # what a session before had loaded and not trained on
        self._unlogged = LoadReport()
        self._consumed, self._skipped = [], {}
        self._saved_end = session.resumed_step * self._global_batch_size
        if self._ledger:
            self._ledger.open(session)

    def collect(self, step: int) -> None:  # noqa: ARG002  part of TrainerHook
        report = self._take_report()
        if self._world.world_size > 1:
            reports = [report] * self._world.world_size
            dist.all_gather_object(reports, report)
            report = merge_reports(reports)
        if self._ledger:
            for replacement in report.replacements:
                step_of_sample = replacement.position // self._global_batch_size + 1
                self._ledger.write({"step": step_of_sample} | replacement.to_json())
        self._consumed = join([*self._consumed, *report.consumed])
        self._unlogged = merge_reports([self._unlogged, replace(report, consumed=())])

    def skip(self, step: int, reason: str) -> None:
        self._skipped[step] = reason

    def take_consumption(self, step: int) -> Consumption | None:
        if not self._world.is_main:
            return None
        start, end = self._saved_end, step * self._global_batch_size
        whole = self._consumed[0] if self._consumed else None
        if len(self._consumed) != 1 or whole is None or (whole.start, whole.end) != (start, end):
            runs = ", ".join(f"{each.start} to {each.end}" for each in self._consumed)
            raise DataError(
                f"step {step}: the loaders gave positions {runs or 'none'} of the stream, expected "
                f"{start} to {end}, each once; nothing was committed: report this"
            )
        skipped = [self._describe_skipped(each) for each in sorted(self._skipped)]
        self._consumed, self._skipped, self._saved_end = [], {}, end
        return Consumption(
            start=start,
            end=end,
            digest=whole.hex_digest,
            stand_ins=[StandInRecord(**asdict(each)) for each in whole.stand_ins],
            skipped=skipped,
            **asdict(self._order),
        )

    def _describe_skipped(self, step: int) -> SkippedStep:
        end = step * self._global_batch_size
        start = end - self._global_batch_size
        return SkippedStep(step=step, start=start, end=end, reason=self._skipped[step])

    def measure(self, elapsed_s: float) -> Mapping[str, float]:
        loaded, self._unlogged = self._unlogged, LoadReport()
        numbers: dict[str, float] = {}
        if loaded.samples_read:
            numbers["train/read_bytes_per_s"] = loaded.bytes_read / elapsed_s
            numbers["train/cache_hit_fraction"] = loaded.cached_samples / loaded.samples_read
        if loaded.retries:
            numbers["train/storage_retries"] = loaded.retries
        if loaded.waited_s:
            numbers["train/storage_wait_s"] = loaded.waited_s
        if self._ledger and self._ledger.num_records:
            numbers["train/damaged_samples"] = self._ledger.num_records
        return numbers

    def save(self, step: int) -> None:  # noqa: ARG002  part of TrainerHook
        if self._ledger:
            self._ledger.flush()

    def end(self) -> None:
        if self._ledger:
            self._ledger.close()


class TellRecovery(TrainerHook):
    """Says what a restart was made of, and its size, once its first step is done.

    The main rank has one.
    """

    def __init__(self, recovery: Recovery, *, stage: str) -> None:
        self._recovery = recovery
        self._stage = stage
        self._is_resumed = False
        self._restored_at: float | None = None
        self._numbers: dict[str, float] = {}

    def start(self, session: Session) -> None:
        self._is_resumed = session.resumed_step > 0
        self._restored_at = time.time()

    def step(self, step: int) -> None:
        if self._restored_at is None:
            return
        parts = self._recovery.parts(restored_at=self._restored_at, stepped_at=time.time())
        self._restored_at = None
        num_workers = self._recovery.num_workers
        self._numbers = {} if num_workers is None else {"train/num_workers": float(num_workers)}
        if not self._is_resumed and "detection" not in parts:
            return  # a start, of nothing that ran before
        self._numbers |= {f"train/recovery_{name}_s": value for name, value in parts.items()}
        logger.info(
            "%s: back at step %d%s after %.1f s (%s)",
            self._stage,
            step,
            "" if num_workers is None else f" with {num_workers} train worker(s)",
            sum(parts.values()),
            ", ".join(f"{name.replace('_', ' ')} {value:.1f} s" for name, value in parts.items()),
        )

    def measure(self, elapsed_s: float) -> Mapping[str, float]:  # noqa: ARG002
        numbers, self._numbers = self._numbers, {}
        return numbers


class WriteMetrics(TrainerHook):
    """Hands every record to sinks; the main rank has one."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = list(sinks)
        self._opened = ExitStack()

    def start(self, session: Session) -> None:
        for sink in self._sinks:
            self._opened.callback(sink.close)
            sink.open(session)

    def record(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        for sink in self._sinks:
            sink.write(step, numbers, images_seen=images_seen)

    def save(self, step: int) -> None:  # noqa: ARG002  part of TrainerHook
        for sink in self._sinks:
            sink.flush()

    def end(self) -> None:
        self._opened.close()
