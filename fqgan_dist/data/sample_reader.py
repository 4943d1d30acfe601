"""Encoded images of samples, from the shard cache or by ranges from the store, each one verified.

A sample is read by its offset in the tar and checked against its digest in the table of samples, so
wrong bytes of a disk, a network or a store never reach a decoder.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import SampleTable, image_digest
from fqgan_dist.data.shard_cache import CacheStats, ShardCache
from fqgan_dist.errors import DataError

_STORE_READS = 2
"""Reads of a sample from the store: the bytes of the first may have been changed on the way."""


@dataclass
class ReadCounts:
    """What several reads gave; for one thread."""

    samples: int = 0
    """Samples with the right bytes."""
    cached: int = 0
    """Of these, samples that the cache had."""
    bytes: int = 0
    """Their bytes."""

    def add(self, *, samples: int, cached: int, bytes: int) -> None:
        """Count one more read."""
        self.samples += samples
        self.cached += cached
        self.bytes += bytes


@dataclass(frozen=True)
class ReaderStats:
    """What one process read since it opened the reader."""

    samples: int
    """Samples with the right bytes."""
    bytes: int
    """Their bytes."""
    wrong_reads: int
    """Reads of a sample from the store that gave wrong bytes."""
    damaged: int
    """Samples whose bytes were wrong again when they were read again."""
    cache: CacheStats | None
    """None: there is no cache."""


class SampleReader:
    """Reads samples of a dataset; safe to use from several threads.

    Picklable: a copy in another process connects for itself and counts for itself.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        load_table: Callable[[int], SampleTable],
        cache: ShardCacheConfig | None,
    ) -> None:
        """Name what is read; nothing is touched yet.

        Args:
            dataset: the samples.
            load_table: gives the table of samples of a shard, by its number in the index; it is
                called for every read, so it remembers. Picklable if the reader is to be.
            cache: where whole shards are kept on this machine; None: every sample is read by range.
        """
        self._dataset = dataset
        self._load_table = load_table
        self._cache_config = cache
        self._start()

    def _start(self) -> None:
        config = self._cache_config
        self._cache = None
        if config is not None:
            self._cache = ShardCache(self._dataset, config)
            # A reader that is forgotten, or whose process ends, needs nothing more.
            weakref.finalize(self, self._cache.stop)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(samples=0, bytes=0, wrong_reads=0, damaged=0)

    def read(
        self, pairs: Sequence[tuple[int, int]], counts: ReadCounts | None = None
    ) -> list[bytes | DataError]:
        """Read the encoded images of samples.

        Args:
            pairs: number of the shard in the index, and row in its table, of each sample.
            counts: what is read is added to them.

        Returns:
            For each sample its bytes, as they were when the dataset was made, or a DataError that
            names the shard and the key: its bytes are wrong, also when they are read again.

        Raises:
            DataError: a shard is missing or shorter than in the index, a table is damaged, or the
                store cannot be reached.
        """
        samples = [self._locate(shard, row) for shard, row in pairs]
        found = self._read_cached(samples)
        num_cached = len(found)
        pending = [number for number in range(len(samples)) if number not in found]
        for _ in range(_STORE_READS):
            parts = self._read_stored([samples[number] for number in pending])
            found.update(_keep_right(samples, pending, parts))
            pending = [number for number in pending if number not in found]
            self._count(wrong_reads=len(pending))
            if not pending:
                break
        num_bytes = sum(map(len, found.values()))
        self._count(samples=len(found), bytes=num_bytes, damaged=len(pending))
        if counts is not None:
            counts.add(samples=len(found), cached=num_cached, bytes=num_bytes)
        return [
            found[number] if number in found else self._describe_damage(sample)
            for number, sample in enumerate(samples)
        ]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Say which shards will be read soon, so that the cache can fetch them."""
        if self._cache is not None:
            # The cache begins with the one that it was asked for last.
            self._cache.request(reversed(shards))

    def wait_for(self, shards: Sequence[int], seconds: float) -> None:
        """Give the cache, if there is one, some time to fetch shards that are needed now."""
        if self._cache is not None:
            self._cache.wait_for(shards, seconds)

    def stats(self) -> ReaderStats:
        """Return the counts of this process so far."""
        cache = self._cache.stats() if self._cache is not None else None
        with self._lock:
            return ReaderStats(**self._counts, cache=cache)

    def close(self) -> None:
        """Stop fetching whole shards; reading is still allowed."""
        if self._cache is not None:
            self._cache.close()

    def __getstate__(self) -> dict[str, Any]:
        names = ("_dataset", "_load_table", "_cache_config")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _locate(self, shard: int, row: int) -> _Sample:
        if not 0 <= shard < len(self._dataset.index.shards):
            raise ValueError(f"shard {shard}: expected 0 to {len(self._dataset.index.shards) - 1}")
        table = self._load_table(shard)
        if not 0 <= row < len(table):
            raise ValueError(f"row {row} of shard {shard}: expected 0 to {len(table) - 1}")
        return _Sample(
            shard,
            table.keys[row],
            int(table.offsets[row]),
            int(table.sizes[row]),
            table.digests[row].tobytes(),
        )

    def _read_cached(self, samples: Sequence[_Sample]) -> dict[int, bytes]:
        """Read what the cache has, by number in `samples`; a shard with wrong bytes is dropped."""
        found: dict[int, bytes] = {}
        if self._cache is None:
            return found
        numbers_of: dict[int, list[int]] = {}
        for number, sample in enumerate(samples):
            numbers_of.setdefault(sample.shard, []).append(number)
        for shard, numbers in numbers_of.items():
            ranges = [(samples[number].offset, samples[number].size) for number in numbers]
            parts = self._cache.read(shard, ranges)
            if parts is None:
                continue
            right = _keep_right(samples, numbers, parts)
            if len(right) < len(numbers):
                self._cache.drop(shard)
            found.update(right)
        return found

    def _read_stored(self, samples: Sequence[_Sample]) -> list[bytes]:
        if not samples:
            return []
        files = [self._dataset.index.shards[sample.shard].file for sample in samples]
        ranges = [
            (file, sample.offset, sample.size) for file, sample in zip(files, samples, strict=True)
        ]
        try:
            return self._dataset.folder.read_ranges(ranges)
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename}: no such file; the dataset is not complete"
            ) from error
        except DataError:
            self._check_sizes({sample.shard for sample in samples})
            raise

    def _check_sizes(self, shards: set[int]) -> None:
        """Raise DataError if a stored shard is not as long as it was made."""
        for shard in sorted(shards):
            entry = self._dataset.index.shards[shard]
            size = self._dataset.folder.size(entry.file)
            if size != entry.bytes:
                raise DataError(
                    f"{self._dataset.folder.uri(entry.file)}: {size} bytes, the index has "
                    f"{entry.bytes}; copy the shard again"
                )

    def _describe_damage(self, sample: _Sample) -> DataError:
        uri = self._dataset.folder.uri(self._dataset.index.shards[sample.shard].file)
        return DataError(
            f"{uri}: sample {sample.key!r}: damaged: its {sample.size} bytes at offset "
            f"{sample.offset} are not those of the table of samples, also when read again; "
            "copy the shard again, and look for more with `fqgan-data verify`"
        )

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._counts.update(amounts)


def _keep_right(
    samples: Sequence[_Sample], numbers: Sequence[int], parts: Sequence[bytes]
) -> dict[int, bytes]:
    """Keep the parts, read for these numbers in `samples`, that are those samples' bytes."""
    found = zip(numbers, parts, strict=True)
    return {number: data for number, data in found if samples[number].is_in(data)}


class _Sample(NamedTuple):
    """Where a sample is and what its bytes are."""

    shard: int
    key: str
    offset: int
    size: int
    digest: bytes

    def is_in(self, data: bytes) -> bool:
        """Whether these are the sample's bytes."""
        return len(data) == self.size and image_digest(data) == self.digest
