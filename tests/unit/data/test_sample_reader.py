from __future__ import annotations

import os
import pickle
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.synthetic_shards import flip_byte, publish_dataset
from support.waiting import wait_until

from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex, SampleTable, load_samples
from fqgan_dist.data.sample_reader import SampleReader
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

COUNTS = (5, 3, 4)
ALL = [(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)]


def load_table(dataset: Storage, index: DatasetIndex, shard: int) -> SampleTable:
    return load_samples(dataset, index.shards[shard])


@dataclass
class StoredDataset:
    storage: Storage
    index: DatasetIndex
    cache: ShardCacheConfig

    def images(self, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
        """What the samples are, read by hand."""
        images = []
        for shard, row in pairs:
            table = load_table(self.storage, self.index, shard)
            images.append(
                self.storage.read_bytes(
                    self.index.shards[shard].file,
                    offset=int(table.offsets[row]),
                    length=int(table.sizes[row]),
                )
            )
        return images

    def reader(self, *, cached: bool = False, storage: Storage | None = None) -> SampleReader:
        store = storage or self.storage
        return SampleReader(
            Dataset(store, self.index),
            load_table=partial(load_table, self.storage, self.index),
            cache=self.cache if cached else None,
        )

    def damage(self, shard: int, row: int) -> None:
        table = load_table(self.storage, self.index, shard)
        flip_byte(self.storage, self.index.shards[shard].file, int(table.offsets[row]))


@pytest.fixture
def dataset(tmp_path: Path) -> StoredDataset:
    return make_dataset(tmp_path)


def make_dataset(folder: Path) -> StoredDataset:
    storage = Storage(folder / "store")
    index = publish_dataset(storage, COUNTS)
    cache = ShardCacheConfig(folder=folder / "cache", max_gib=1, min_free_gib=0)
    return StoredDataset(storage, index, cache)


def fill_cache(reader: SampleReader, shards: int = len(COUNTS)) -> None:
    reader.prefetch(range(shards))
    wait_until(lambda: count_cached(reader) == shards)


def count_cached(reader: SampleReader) -> int:
    folder = reader._cache_config.find_folder()  # type: ignore[union-attr]
    return len(list(folder.glob("*.tar")))


@pytest.mark.parametrize("cached", [False, True])
def test_samples_come_in_the_order_asked_for(dataset: StoredDataset, cached: bool) -> None:
    pairs = [(2, 1), (0, 4), (2, 1), (1, 0), (0, 0)]
    reader = dataset.reader(cached=cached)
    for _ in range(2):
        assert reader.read(pairs) == dataset.images(pairs)
        if cached:
            fill_cache(reader)
    reader.close()
    stats = reader.stats()
    assert (stats.samples, stats.damaged, stats.wrong_reads) == (10, 0, 0)
    assert stats.bytes == 2 * sum(map(len, dataset.images(pairs)))
    if cached:
        assert stats.cache is not None
        assert stats.cache.hits >= 5


def test_nothing_is_read_of_nothing(dataset: StoredDataset) -> None:
    assert dataset.reader().read([]) == []


def test_flipped_byte_in_a_stored_shard_is_named_and_never_given_out(
    dataset: StoredDataset,
) -> None:
    good = dataset.images(ALL)
    dataset.damage(1, 2)
    reader = dataset.reader()
    read = reader.read(ALL)
    place = ALL.index((1, 2))
    assert isinstance(read[place], DataError)
    message = str(read[place])
    assert message.startswith(
        f"{dataset.storage.uri('shard-000001.tar')}: sample 's0-1-2': damaged"
    )
    assert "fqgan-data verify" in message
    assert [*read[:place], *read[place + 1 :]] == [*good[:place], *good[place + 1 :]]
    assert reader.stats().damaged == 1


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(st.sampled_from(ALL), max_size=20),
    damaged=st.sets(st.sampled_from(ALL), max_size=4),
)
def test_exactly_the_damaged_samples_are_errors(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[int, int]],
    damaged: set[tuple[int, int]],
) -> None:
    dataset = make_dataset(tmp_path_factory.mktemp("data"))
    good = dataset.images(pairs)
    for shard, row in damaged:
        dataset.damage(shard, row)
    for pair, data, expected in zip(pairs, dataset.reader().read(pairs), good, strict=True):
        if pair in damaged:
            assert isinstance(data, DataError)
        else:
            assert data == expected


class BadLine(Storage):
    """A store whose first answers have a wrong byte each."""

    num_spoiled = 0
    num_calls = 0

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        self.num_calls += 1
        parts = super().read_ranges(ranges)
        if self.num_spoiled:
            self.num_spoiled -= 1
            parts = [bytes([part[0] ^ 1]) + part[1:] for part in parts]
        return parts


def test_bytes_that_changed_on_the_way_are_read_again(dataset: StoredDataset) -> None:
    line = BadLine(dataset.storage.root)
    line.num_spoiled = 1
    reader = dataset.reader(storage=line)
    assert reader.read(ALL) == dataset.images(ALL)
    assert (reader.stats().wrong_reads, reader.stats().damaged) == (len(ALL), 0)


def test_wrong_bytes_are_read_again_only_once(dataset: StoredDataset) -> None:
    line = BadLine(dataset.storage.root)
    line.num_spoiled = 10
    assert all(isinstance(data, DataError) for data in dataset.reader(storage=line).read(ALL))
    assert line.num_calls == 2


def test_missing_shard_is_an_error_of_the_dataset_not_of_a_sample(dataset: StoredDataset) -> None:
    dataset.storage.delete("shard-000001.tar")
    with pytest.raises(DataError, match=r"shard-000001.tar: no such file; the dataset is not"):
        dataset.reader().read(ALL)


def test_cut_shard_is_an_error_of_the_dataset_not_of_a_sample(dataset: StoredDataset) -> None:
    dataset.storage.write_bytes(
        "shard-000001.tar", dataset.storage.read_bytes("shard-000001.tar", length=600)
    )
    with pytest.raises(DataError, match=r"shard-000001.tar: 600 bytes, the index has \d+"):
        dataset.reader().read(ALL)


@pytest.mark.parametrize("pair", [(3, 0), (-1, 0), (0, 5), (0, -1)])
def test_sample_that_the_dataset_does_not_have_is_a_value_error(
    dataset: StoredDataset, pair: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match="expected 0 to"):
        dataset.reader().read([pair])


@pytest.mark.parametrize("cached", [False, True])
def test_copy_for_another_process_reads_the_same(dataset: StoredDataset, cached: bool) -> None:
    reader = dataset.reader(cached=cached)
    reader.read(ALL)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.stats().samples == 0
    assert copy.read(ALL) == reader.read(ALL) == dataset.images(ALL)
    reader.close()
    copy.close()


def test_threads_may_share_a_reader_and_its_cache(dataset: StoredDataset) -> None:
    reader = dataset.reader(cached=True)
    good = dict(zip(ALL, dataset.images(ALL), strict=True))
    started = threading.Barrier(4)

    def read_many(seed: int) -> None:
        random_state = random.Random(seed)
        started.wait()
        for _ in range(40):
            pairs = random_state.choices(ALL, k=6)
            assert reader.read(pairs) == [good[pair] for pair in pairs]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_many, range(4)))
    reader.close()
    assert reader.stats().samples == 4 * 40 * 6


def test_damaged_cached_shard_is_dropped_and_fetched_again(
    dataset: StoredDataset, caplog: pytest.LogCaptureFixture
) -> None:
    reader = dataset.reader(cached=True)
    fill_cache(reader)
    file = dataset.cache.find_folder() / f"{dataset.index.shards[0].sha256}.tar"
    damage_unseen(file, int(load_table(dataset.storage, dataset.index, 0).offsets[2]))
    assert reader.read(ALL) == dataset.images(ALL)
    assert "shard-000000.tar: the copy in the cache" in caplog.text
    fill_cache(reader)
    assert reader.read([(0, 2)]) == dataset.images([(0, 2)])
    reader.close()
    stats = reader.stats()
    assert stats.damaged == stats.wrong_reads == 0
    assert stats.cache is not None
    assert stats.cache.damaged == 1
    assert stats.cache.hits == len(ALL) + 1


def damage_unseen(file: Path, offset: int) -> None:
    """Flip a byte as a bad disk does: size and times of the file stay."""
    times = file.stat()
    flip_byte(Storage(file.parent), file.name, offset)

    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
