"""Where records are: the files of teacher features and codes of a dataset, below a prefix.

<prefix>/<fingerprint>/view-VV/shard-NNNNNN.parquet     features: one row per key
<prefix>/<fingerprint>/shard-NNNNNN.parquet             codes: one row per key and view
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fqgan_dist.data.index import ShardEntry
from fqgan_dist.data.node_copies import NodeCopies
from fqgan_dist.data.records import (
    MAX_VIEWS,
    RecordTable,
    decode_records,
    encode_records,
    pack_codes,
    pack_crops,
)
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, eq=False)
class DrawnCodes:
    """Codes of one view of each of a shard's n samples."""

    codes: np.ndarray
    """(n, K, h, w) uint16."""
    views: np.ndarray
    """Which view it is, (n,) int64."""
    damaged: frozenset[int]
    """Samples whose images were damaged: their codes mean nothing."""


class _RecordStore:
    """Files of one fingerprint below a prefix of a storage."""

    def __init__(self, storage: Storage, prefix: str, fingerprint: str) -> None:
        if _FINGERPRINT.fullmatch(fingerprint) is None:
            raise ValueError(f"fingerprint {fingerprint!r}: expected 8 to 64 hexadecimal digits")
        self.storage = storage
        self.folder = f"{prefix}/{fingerprint}"
        self.fingerprint = fingerprint

    def _write(self, path: str, entry: ShardEntry, table: RecordTable) -> None:
        data = encode_records(table, fingerprint=self.fingerprint, shard_sha256=entry.sha256)
        self.storage.write_bytes(path, data)

    def _read(self, path: str, entry: ShardEntry, copies: NodeCopies | None = None) -> RecordTable:
        try:
            return self._read_once(path, entry, copies)
        except DataError:
            # The way or the copy, not the store, may have changed bytes.
            if copies is not None:
                copies.drop(self.storage, path, self._identify(entry))
            return self._read_once(path, entry, None)

    def _identify(self, entry: ShardEntry) -> str:
        return f"{self.fingerprint} {entry.sha256}"

    def _read_once(self, path: str, entry: ShardEntry, copies: NodeCopies | None) -> RecordTable:
        source = self.storage.uri(path)
        try:
            if copies is None:
                data = self.storage.read_bytes(path)
            else:
                data = copies.read(self.storage, path, self._identify(entry))
        except FileNotFoundError as error:
            raise DataError(f"{source}: no such file; run the stage that computes it") from error
        return decode_records(
            data,
            fingerprint=self.fingerprint,
            shard_sha256=entry.sha256,
            source=source,
            max_rows=entry.count * MAX_VIEWS,
        )


class FeatureStore(_RecordStore):
    """Teacher features: one file per shard and view, a column per teacher."""

    def path(self, entry: ShardEntry, view: int) -> str:
        """Name the file of a shard and view.

        Raises:
            ValueError: the view is not in [0, 128).
        """
        if not 0 <= view < MAX_VIEWS:
            raise ValueError(f"view {view}: expected a view in [0, {MAX_VIEWS})")
        return f"{self.folder}/view-{view:02d}/{entry.file.removesuffix('.tar')}.parquet"

    def exists(self, entry: ShardEntry, view: int) -> bool:
        """Tell whether a shard and view are done; a file is written whole or not at all."""
        return self.storage.exists(self.path(entry, view))

    def write(
        self,
        entry: ShardEntry,
        view: int,
        *,
        keys: list[str],
        crops: list[CropRecord],
        features: Mapping[str, np.ndarray],
        damaged: Collection[int] = (),
    ) -> None:
        """Write a shard's features of one view, in the order of the shard's rows.

        Args:
            entry: the shard.
            view: the view.
            keys: all keys of the shard.
            crops: the crop of each key.
            features: by teacher, (n, F) float; stored as float16.
            damaged: rows whose images are damaged; zeros are stored for them.
        """
        with np.errstate(over="ignore"):  # what overflows is reported with its column's name
            columns = {name: np.asarray(values).astype("<f2") for name, values in features.items()}
        table = RecordTable(
            keys,
            np.full(len(keys), view, np.int8),
            pack_crops(crops),
            {name: _clear_rows(values, damaged) for name, values in columns.items()},
            frozenset(damaged),
        )
        self._write(self.path(entry, view), entry, table)

    def read(
        self,
        entry: ShardEntry,
        view: int,
        keys: Sequence[str],
        *,
        copies: NodeCopies | None = None,
    ) -> RecordTable:
        """Read a shard's features of one view.

        Args:
            entry: the shard.
            view: the view.
            keys: all keys of the shard.
            copies: where other processes of the node find what this one reads; None: nowhere.

        Raises:
            DataError: missing, damaged, of something else, or not of these keys in this order.
        """
        path = self.path(entry, view)
        table = self._read(path, entry, copies)
        if table.keys != list(keys) or not (table.views == view).all():
            raise DataError(
                f"{self.storage.uri(path)}: its keys or views are not those of {entry.file!r}, "
                f"view {view}; delete the file and compute it again"
            )
        return table


class CodeStore(_RecordStore):
    """Codes: one file per shard, a column per codebook, a row per key and view (key by key)."""

    def path(self, entry: ShardEntry) -> str:
        """Name the file of a shard."""
        return f"{self.folder}/{entry.file.removesuffix('.tar')}.parquet"

    def exists(self, entry: ShardEntry) -> bool:
        """Tell whether a shard is done; a file is written whole or not at all."""
        return self.storage.exists(self.path(entry))

    def write(
        self,
        entry: ShardEntry,
        *,
        keys: list[str],
        crops: list[list[CropRecord]],
        codes: np.ndarray,
        codebooks: Sequence[str],
        damaged: Collection[int] = (),
    ) -> None:
        """Write a shard's codes, in the order of the shard's rows.

        Args:
            entry: the shard.
            keys: all n keys of the shard.
            crops: for each key the crop of each view.
            codes: (n, views, K, h, w) whole numbers in [0, 65536).
            codebooks: K names, in the order of the model.
            damaged: which of the n keys have damaged images; zeros are stored for them.
        """
        num_views = codes.shape[1]
        if not 1 <= num_views <= MAX_VIEWS or len(codes) != len(keys):
            raise ValueError(
                f"codes {codes.shape}: expected ({len(keys)}, views up to {MAX_VIEWS}, K, h, w)"
            )
        codes = _clear_rows(codes, damaged)
        table = RecordTable(
            keys=[key for key in keys for _ in range(num_views)],
            views=np.tile(np.arange(num_views, dtype=np.int8), len(keys)),
            crops=pack_crops([crop for per_key in crops for crop in per_key]),
            columns=pack_codes(codes.reshape(-1, *codes.shape[2:]), codebooks),
            damaged=frozenset(
                row * num_views + view for row in damaged for view in range(num_views)
            ),
        )
        self._write(self.path(entry), entry, table)

    def read(self, entry: ShardEntry, keys: Sequence[str]) -> tuple[np.ndarray, frozenset[int]]:
        """Read a shard's codes.

        Returns:
            The codes, (n, views, K, h, w) uint16, codebooks in the order written; and the rows of
            the samples whose images were damaged, whose codes mean nothing.

        Raises:
            DataError: as `read_drawn`.
        """
        columns, damaged = self._read_columns(entry, keys)
        return np.stack(columns, axis=2), damaged

    def read_drawn(
        self, entry: ShardEntry, keys: Sequence[str], draw: Callable[[str, int], int]
    ) -> DrawnCodes:
        """Read one view's codes of each sample of a shard, without copying the others.

        Args:
            entry: the shard.
            keys: its keys.
            draw: chooses the view of a key, of as many as are stored.

        Raises:
            DataError: missing, damaged, of something else, or not of these keys in this order.
        """
        columns, damaged = self._read_columns(entry, keys)
        num_views = columns[0].shape[1]
        views = np.array([draw(key, num_views) for key in keys], np.int64)
        rows = np.arange(len(keys))
        codes = np.stack([column[rows, views] for column in columns], axis=1)
        return DrawnCodes(codes, views, damaged)

    def _read_columns(
        self, entry: ShardEntry, keys: Sequence[str]
    ) -> tuple[list[np.ndarray], frozenset[int]]:
        """Read each codebook's codes, (n, views, h, w), and which samples were damaged."""
        path = self.path(entry)
        table = self._read(path, entry)
        num_views = len(table) // max(1, len(keys))
        expected_keys = [key for key in keys for _ in range(num_views)]
        expected_views = np.tile(np.arange(num_views, dtype=np.int8), len(keys))
        is_fitting = table.keys == expected_keys and np.array_equal(table.views, expected_views)
        if not (is_fitting and num_views and table.columns):
            raise DataError(
                f"{self.storage.uri(path)}: its keys or views are not those of {entry.file!r}; "
                "delete the file and compute it again"
            )
        columns = [
            values.reshape(len(keys), num_views, *values.shape[1:])
            for values in table.columns.values()
        ]
        return columns, frozenset(row // num_views for row in table.damaged)


def _clear_rows(values: np.ndarray, rows: Collection[int]) -> np.ndarray:
    """Give values with zeros in some rows, so that equal damage gives equal files."""
    if not rows:
        return values
    cleared = values.copy()
    cleared[list(rows)] = 0
    return cleared
