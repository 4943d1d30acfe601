"""A dataset that is being read: its folder and its index, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.storage.storage import Storage


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset."""

    folder: Storage
    """Holds the shards, their tables and the index."""
    index: DatasetIndex

    @property
    def id(self) -> str:
        """The dataset id, which fixes all bytes."""
        return self.index.dataset_id
