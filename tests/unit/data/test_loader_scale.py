"""ImageNet ten times over: opening and resuming do not depend on the number of samples.

The bounds are the issue's own, of CPU time: the machine may be busy. Memory is measured by
`benchmarks/data.py`.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex, ShardEntry, load_index, write_index
from fqgan_dist.data.micro_batches import Batching, ImageSource
from fqgan_dist.storage.storage import Storage

NUM_SHARDS, SHARD_SAMPLES = 10_000, 1_200


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("scale"))
    shards = [
        ShardEntry(
            file=f"shard-{number:06d}.tar",
            count=SHARD_SAMPLES,
            bytes=10**8 + number,
            sha256=f"{number:064x}",
            samples_sha256=f"{number + 10**9:064x}",
        )
        for number in range(NUM_SHARDS)
    ]
    index = DatasetIndex(
        name="large", split="train", classes=["one"], image_policy={}, shards=shards
    )
    write_index(storage, index)
    return storage


def open_source(storage: Storage) -> ImageSource:
    batching = Batching(seed=0, window_shards=8, micro_batch_size=32, micro_batches_per_step=8)
    return ImageSource(
        Dataset(storage, load_index(storage)),
        batching,
        view=ViewConfig(policy="center", image_size=8),
        num_views=None,
        features=None,
        max_damaged_in_a_row=5,
        cache=None,
    )


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def test_twelve_million_samples_open_and_resume_in_a_moment(storage: Storage) -> None:
    with at_most(2.0):
        source = open_source(storage)
    num_samples = NUM_SHARDS * SHARD_SAMPLES
    assert source.order.num_samples == num_samples
    for step in (0, 10**6, 10**9):
        with at_most(1.0):
            places = source.locate(range(step * 256, step * 256 + 256))
            source.order.upcoming_shards(places[-1].position)
            next(source.candidates(places[0].position))
        assert places[0].epoch == step * 256 // num_samples


def test_the_index_reaches_a_spawned_loader_worker_in_a_moment(storage: Storage) -> None:
    index = load_index(storage)
    with at_most(1.0):
        copy = pickle.loads(pickle.dumps(index))
    assert copy.dataset_id == index.dataset_id
