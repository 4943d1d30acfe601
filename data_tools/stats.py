"""`fqgan-data stats`: what is in a dataset, from its index and tables alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fqgan_dist.config import Config
from fqgan_dist.data.index import DatasetIndex, SampleTable, load_index, load_samples
from fqgan_dist.data.storage import Storage
from fqgan_dist.sharding.sources.opening import Progress


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
    """Members of the source that were left out; they are named in the index."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def compute_stats(uri: str, *, progress: Progress) -> DatasetStats:
    """Measure a dataset.

    Raises:
        DataError: there is no dataset, or its index or a table is damaged.
    """
    storage = Storage(uri)
    index = load_index(storage, "")
    tables: list[SampleTable] = []
    for shard in index.shards:
        tables.append(load_samples(storage, "", shard))
        progress("reading tables", len(tables), len(index.shards))
    return _summarise(index, tables)


def _summarise(index: DatasetIndex, tables: list[SampleTable]) -> DatasetStats:
    labels = np.concatenate([table.labels for table in tables])
    return DatasetStats(
        dataset_id=index.dataset_id,
        name=index.name,
        split=index.split,
        image_policy=index.image_policy,
        num_samples=index.num_samples,
        num_classes=index.num_classes,
        num_shards=len(index.shards),
        num_bytes=sum(shard.bytes for shard in index.shards),
        samples_per_class=_spread(np.bincount(labels, minlength=index.num_classes)),
        samples_per_shard=_spread(np.array([len(table) for table in tables])),
        classes_per_shard=_spread(np.array([len(np.unique(table.labels)) for table in tables])),
        image_bytes=_spread(np.concatenate([table.sizes for table in tables])),
        width=_spread(np.concatenate([table.widths for table in tables])),
        height=_spread(np.concatenate([table.heights for table in tables])),
        num_problems=len(index.problems),
    )


def _spread(values: np.ndarray) -> Spread:
    return Spread(float(values.min()), float(np.median(values)), float(values.max()))
