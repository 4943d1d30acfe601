"""A dataset that is being read: its folder and its index, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from fqgan_dist.data.index import DatasetIndex, load_index, load_pinned_index
from fqgan_dist.storage.storage import Storage


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset."""

    folder: Storage
    """Holds the shards, their tables and the index."""
    index: DatasetIndex
    """The index as it was read: an extension of the dataset does not change what is read."""

    @classmethod
    def open(cls, folder: Storage, *, expected_id: str | None = None) -> Dataset:
        """Read the index of a finished dataset.

        Args:
            folder: the dataset's folder.
            expected_id: id of the dataset that it must be; None: whichever is there.

        Raises:
            DataError: there is no dataset, its index is damaged, or it is another dataset.
        """
        if expected_id is None:
            return cls(folder, load_index(folder))
        return cls(folder, load_pinned_index(folder, expected_id))

    @property
    def id(self) -> str:
        """The dataset id, which fixes all bytes."""
        return self.index.dataset_id
