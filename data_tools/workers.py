"""Where a command's shards are made: processes of this machine, or actors of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from pydantic import Field

from fqgan_dist.chunks import RunChunks, run_in_processes
from fqgan_dist.config import Config
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer


class WorkerOptions(Config):
    """Options of commands that make shards."""

    engine: Literal["processes", "ray"] = "processes"
    """`processes` of this machine, or actors of the `ray` cluster that RAY_ADDRESS names; without
    that, of a Ray that is started here. The result is the same."""
    workers: int | None = Field(default=None, ge=1)
    """Processes or actors, each of which holds one shard in memory and uses one core; none: one
    per core of this machine, or per CPU slot of the cluster."""


@contextmanager
def open_workers(
    options: WorkerOptions, storage: Storage, source: SourceListing, observer: Observer
) -> Iterator[RunChunks]:
    """Have what makes shards for a block.

    Args:
        options: which workers, and how many.
        storage: where shards are written.
        source: where images are read.
        observer: is told how far it is.

    Raises:
        ClusterError: the cluster cannot be joined, or does not see source or destination.
    """
    if options.engine == "processes":
        workers = count_workers(options.workers)
        yield partial(run_in_processes, workers=workers, observer=observer)
        return
    # Ray is imported here only: all else runs without it.
    from fqgan_dist.orchestration.shard_pool import open_shard_pool

    with open_shard_pool(storage, source, workers=options.workers, observer=observer) as run:
        yield run


def count_workers(asked: int | None) -> int:
    """Give the number of processes: what was asked for, else one per core."""
    return asked or len(os.sched_getaffinity(0))
