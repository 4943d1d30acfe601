"""What happens beside a training: progress, the account of loading, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch.distributed as dist

from fqgan_dist.data.batches import LoadReport, merge_reports
from fqgan_dist.telemetry.metric_sink import MetricSink
from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.telemetry.published import PublishedRecords
from fqgan_dist.world import World


class TrainerHook:
    """Is called by the trainer at these moments, which pass without effect unless overridden.

    Hooks are called in the order of the trainer's list. Every rank has its own list: what makes
    ranks wait for each other must be in all of them.
    """

    def start(self, first_step: int) -> None:
        """Begin: `first_step` steps were done by former sessions, and what came later is void."""

    def step(self, step: int) -> None:
        """Note that a step was done; on most steps nothing else happens."""

    def collect(self, step: int) -> None:
        """Exchange what ranks know, before a step that is logged or saved."""

    def measure(self, elapsed_s: float) -> Mapping[str, float]:  # noqa: ARG002
        """Add to the record of a step that is logged, `elapsed_s` seconds after the last."""
        return {}

    def record(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        """Take the metrics of a step, those of its evaluation in a record of their own."""

    def save(self, step: int) -> None:
        """Bring to the storage what the checkpoint that follows must not be without."""

    def end(self) -> None:
        """Close what `start` opened, however far it came and however training ended."""


class ShowProgress(TrainerHook):
    """Advances a bar once a step."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar

    def start(self, first_step: int) -> None:
        self._bar.skip(first_step)

    def step(self, step: int) -> None:  # noqa: ARG002  part of TrainerHook
        self._bar.advance()


class AccountForLoading(TrainerHook):
    """Adds up what all ranks' loaders did, and keeps the ledger of damaged samples."""

    def __init__(
        self,
        take_report: Callable[[], LoadReport],
        ledger: PublishedRecords | None,
        *,
        world: World,
        global_batch_size: int,
    ) -> None:
        """Hold what is needed; every rank has one.

        `take_report` tells what this rank's loader did since the last call. The ledger gets a line
        for each slot whose sample was replaced; None on all but the main rank.
        """
        self._take_report = take_report
        self._ledger = ledger
        self._world = world
        self._global_batch_size = global_batch_size
        self._unlogged = LoadReport()

    def start(self, first_step: int) -> None:
        if self._ledger:
            self._ledger.open(first_step)

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
        self._unlogged = merge_reports([self._unlogged, report])

    def measure(self, elapsed_s: float) -> Mapping[str, float]:
        loaded, self._unlogged = self._unlogged, LoadReport()
        numbers: dict[str, float] = {}
        if loaded.samples_read:
            numbers["train/read_bytes_per_s"] = loaded.bytes_read / elapsed_s
            numbers["train/cache_hit_fraction"] = loaded.cached_samples / loaded.samples_read
        if loaded.retries:
            numbers["train/storage_retries"] = loaded.retries
        if self._ledger and self._ledger.num_records:
            numbers["train/damaged_samples"] = self._ledger.num_records
        return numbers

    def save(self, step: int) -> None:  # noqa: ARG002  part of TrainerHook
        if self._ledger:
            self._ledger.flush()

    def end(self) -> None:
        if self._ledger:
            self._ledger.close()


class WriteMetrics(TrainerHook):
    """Hands every record to sinks; the main rank has one."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = list(sinks)
        self._opened = ExitStack()

    def start(self, first_step: int) -> None:
        for sink in self._sinks:
            self._opened.callback(sink.close)
            sink.open(first_step)

    def record(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        for sink in self._sinks:
            sink.write(step, numbers, images_seen=images_seen)

    def save(self, step: int) -> None:  # noqa: ARG002  part of TrainerHook
        for sink in self._sinks:
            sink.flush()

    def end(self) -> None:
        self._opened.close()
