"""Let processes of several jobs read through one shard cache and die of SIGKILL, again and again.

    python tests/support/cache_processes.py STORE CACHE MAX_BYTES KILLS

STORE holds some datasets. A job is a fork of this process, which has imported the library and has
no threads; it reads random samples of one dataset and compares them until it is killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass

from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import SampleTable, load_samples
from fqgan_dist.data.sample_reader import SampleReader
from fqgan_dist.storage.storage import Storage

_JOBS = 3
_MOST_LIFETIME_S = 0.15


@dataclass
class KnownDataset:
    """A dataset and all its images."""

    dataset: Dataset
    tables: list[SampleTable]
    images: dict[tuple[int, int], bytes]


def read_all(storage: Storage) -> KnownDataset:
    """Read a dataset by hand."""
    dataset = Dataset.open(storage)
    shards = dataset.index.shards
    tables = [load_samples(storage, entry) for entry in shards]
    images = {
        (shard, row): storage.read_bytes(
            shards[shard].file, offset=int(table.offsets[row]), length=int(table.sizes[row])
        )
        for shard, table in enumerate(tables)
        for row in range(len(table))
    }
    return KnownDataset(dataset, tables, images)


def read_until_killed(known: KnownDataset, cache: ShardCacheConfig, seed: int) -> None:
    """Read random samples for ever; return only if one is wrong."""
    reader = SampleReader(known.dataset, load_table=known.tables.__getitem__, cache=cache)
    pick = random.Random(seed)
    places = list(known.images)
    while True:
        pairs = pick.choices(places, k=5)
        if reader.read(pairs) != [known.images[pair] for pair in pairs]:
            return


def start_job(dataset: KnownDataset, cache: ShardCacheConfig, seed: int) -> int:
    """Start a job and return its process id."""
    child = os.fork()
    if child == 0:
        read_until_killed(dataset, cache, seed)
        os._exit(1)
    return child


def run(store: str, cache_folder: str, max_bytes: int, kills: int) -> int:
    """Kill jobs at random points; fail if one ended by itself."""
    root = Storage(store)
    datasets = [read_all(root.child(name)) for name in root.list()]
    cache = ShardCacheConfig.model_validate(
        {"folder": cache_folder, "max_gib": max_bytes / 2**30, "min_free_gib": 0}
    )
    pick = random.Random(1)
    jobs: list[int] = []
    for number in range(kills + _JOBS):
        if len(jobs) == _JOBS or number >= kills:
            time.sleep(pick.uniform(0, _MOST_LIFETIME_S))
            job = jobs.pop(pick.randrange(len(jobs)))
            os.kill(job, signal.SIGKILL)
            _, status = os.waitpid(job, 0)
            if not os.WIFSIGNALED(status):
                sys.stderr.write("a job read wrong bytes, or failed\n")
                return 1
        if number < kills:
            jobs.append(start_job(pick.choice(datasets), cache, number))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
