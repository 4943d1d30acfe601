"""Where a command's shards are made: processes of this machine, or actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Literal

from pydantic import Field

from fqgan_dist.chunks import ReportProgress, RunChunks, run_in_processes
from fqgan_dist.config import Config
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.telemetry.summary import Metric


class EngineOptions(Config):
    """Options of commands that make shards."""

    engine: Literal["processes", "ray"] = "processes"
    """`processes` of this machine, or actors of the `ray` cluster that RAY_ADDRESS names; without
    that, of a Ray that is started here. The result is the same."""
    workers: int | None = Field(default=None, ge=1)
    """Processes or actors, each of which holds one shard in memory and uses one core; none: one
    per core of this machine, or per CPU slot of the cluster."""


@contextmanager
def open_engine(
    options: EngineOptions, storage: Storage, source: SourceListing, progress: ReportProgress
) -> Iterator[RunChunks]:
    """Have what makes shards for a block.

    Args:
        options: which engine.
        storage: where shards are written.
        source: where images are read.
        progress: told about images.

    Raises:
        ClusterError: the cluster cannot be joined, or does not see source or destination.
    """
    if options.engine == "processes":
        workers = count_workers(options.workers)
        yield partial(run_in_processes, workers=workers, progress=progress)
        return
    # Ray is imported here only: all else runs without it.
    from fqgan_dist.orchestration.shard_pool import open_shard_pool

    observer = _Reporter(progress)
    with open_shard_pool(storage, source, workers=options.workers, observer=observer) as run:
        yield run


def count_workers(asked: int | None) -> int:
    """Give the number of processes: what was asked for, else one per core."""
    return asked or len(os.sched_getaffinity(0))


class _Reporter:
    """An `Observer` that tells a `ReportProgress`."""

    def __init__(self, progress: ReportProgress) -> None:
        self._progress = progress

    @contextmanager
    def track(self, total: int | None, description: str, unit: str) -> Iterator[ProgressBar]:  # noqa: ARG002
        yield _ReportedBar(self._progress, description, total or 0)

    def record_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: shards have no metrics."""


class _ReportedBar(ProgressBar):
    def __init__(self, progress: ReportProgress, description: str, total: int) -> None:
        self._progress = progress
        self._description = description
        self._total = total
        self._done = 0

    def advance(self, count: int = 1, **fields: Metric) -> None:  # noqa: ARG002
        self._report(count)

    def skip(self, count: int) -> None:
        self._report(count)

    def _report(self, count: int) -> None:
        self._done += count
        self._progress(self._description, self._done, self._total)
