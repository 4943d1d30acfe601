"""`fqgan-data stats`: what is in a dataset, from its index and tables alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from fqgan_dist.config import Config
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import ShardEntry, load_samples
from fqgan_dist.data.prefetch import load_in_threads
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer

_THREADS = 16
"""Tables read at once; each is mostly waiting where the dataset is in a bucket."""
_PENDING_VALUES = 2**20


class StatsOptions(Config):
    """`fqgan-data stats` has no options."""


@dataclass(frozen=True)
class Spread:
    """Least, middle and greatest of some numbers."""

    minimum: float
    """The least."""
    median: float
    """Half are below."""
    maximum: float
    """The greatest."""


class Histogram:
    """Counts of whole numbers, exact; memory grows with the number of different ones.

    12 million images have some 10,000 different widths and 300,000 different sizes in bytes.
    """

    def __init__(self) -> None:
        self._values = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def add(self, values: np.ndarray) -> None:
        """Count some more numbers."""
        self._pending.append(values)
        self._num_pending += len(values)
        if self._num_pending >= _PENDING_VALUES:
            self._merge()

    def spread(self) -> Spread:
        """Give the least, the middle and the greatest of all; of two in the middle their mean."""
        self._merge()
        below = np.cumsum(self._counts)
        total = int(below[-1])
        middle = np.searchsorted(below, [(total - 1) // 2, total // 2], side="right")
        median = float(self._values[middle].mean())
        return Spread(float(self._values[0]), median, float(self._values[-1]))

    def _merge(self) -> None:
        new = np.concatenate([np.empty(0, np.int64), *self._pending])
        values, counts = np.unique(new, return_counts=True)
        merged, positions = np.unique(np.concatenate([self._values, values]), return_inverse=True)
        totals = np.zeros(len(merged), np.int64)
        np.add.at(totals, positions, np.concatenate([self._counts, counts]))
        self._values, self._counts = merged, totals
        self._pending, self._num_pending = [], 0


@dataclass(frozen=True)
class DatasetStats:
    """Sizes of a dataset."""

    dataset_id: str
    """The sha256 of the index."""
    name: str
    """Name of the dataset."""
    split: str
    """Part of the dataset."""
    image_policy: dict[str, Any]
    """How the images were made."""
    num_samples: int
    """Images."""
    num_classes: int
    """Classes, those without an image included."""
    num_shards: int
    """Shards."""
    num_bytes: int
    """Bytes of all tars."""
    samples_per_class: Spread
    """Images of a class."""
    samples_per_shard: Spread
    """Images of a shard."""
    classes_per_shard: Spread
    """Different classes in a shard: how well the classes are mixed."""
    image_bytes: Spread
    """Bytes of an image."""
    width: Spread
    """Pixels."""
    height: Spread
    """Pixels."""
    num_problems: int
    """Members of the source that were left out; the index or its tables of problems name them."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def compute_stats(uri: str, *, observer: Observer) -> DatasetStats:
    """Measure a dataset, one table of samples at a time.

    Raises:
        DataError: there is no dataset, or its index or a table is damaged.
    """
    dataset = Dataset.open(Storage(uri))
    index = dataset.index
    columns = {name: Histogram() for name in ("sizes", "widths", "heights")}
    class_counts = np.zeros(index.num_classes, np.int64)
    mixtures = Histogram()
    load = partial(load_samples, dataset.folder)
    tables = load_in_threads(load, index.shards, threads=_THREADS, ahead=_THREADS)
    with observer.track(len(index.shards), "reading tables", "shards") as bar:
        for entry, table in zip(index.shards, tables, strict=True):
            for name, histogram in columns.items():
                histogram.add(getattr(table, name))
            # Before they are counted, which takes memory for the greatest.
            if (greatest := int(table.labels.max())) >= index.num_classes:
                _refuse_label(dataset, entry, greatest)
            counts = np.bincount(table.labels, minlength=index.num_classes)
            class_counts += counts
            mixtures.add(np.array([np.count_nonzero(counts)]))
            bar.advance()
    return DatasetStats(
        dataset_id=dataset.id,
        name=index.name,
        split=index.split,
        image_policy=index.image_policy,
        num_samples=index.num_samples,
        num_classes=index.num_classes,
        num_shards=len(index.shards),
        num_bytes=sum(shard.bytes for shard in index.shards),
        samples_per_class=_spread(class_counts),
        samples_per_shard=_spread(np.array([shard.count for shard in index.shards])),
        classes_per_shard=mixtures.spread(),
        image_bytes=columns["sizes"].spread(),
        width=columns["widths"].spread(),
        height=columns["heights"].spread(),
        num_problems=index.num_problems,
    )


def _refuse_label(dataset: Dataset, entry: ShardEntry, label: int) -> None:
    raise DataError(
        f"{dataset.folder.uri(entry.samples_file)}: label {label}, but the index has "
        f"{dataset.index.num_classes} classes; see `fqgan-data verify`"
    )


def _spread(values: np.ndarray) -> Spread:
    histogram = Histogram()
    histogram.add(values)
    return histogram.spread()
