"""Records: what was computed once per image and view (teacher features, codes), as parquet files.

A row is a key, a view, the crop it was computed from, and fixed-size binary columns of numbers,
little-endian. The file's metadata names what it was computed from: the fingerprint (weights,
preprocessing, views, dataset) and the sha256 of the shard. A reader refuses what does not fit.
It also lists the rows whose images were damaged, which hold zeros; without such rows it says
nothing of them, as files from before there was that list.

    <prefix>/<fingerprint>/view-VV/shard-NNNNNN.parquet     features: one row per key
    <prefix>/<fingerprint>/shard-NNNNNN.parquet             codes: one row per key and view
"""

from __future__ import annotations

import hashlib
import io
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from fqgan_dist.config import MAX_COUNT, Config
from fqgan_dist.data.index import ShardEntry
from fqgan_dist.data.node_copies import NodeCopies
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.storage.storage import Storage

MAX_CODEBOOK_SIZE = 2**16
MAX_VIEWS = 2**7  # views are stored as int8

_METADATA_KEY = b"fqgan_records"
_FIXED_COLUMNS = ("key", "view", "crop_top", "crop_left", "resized_height", "resized_width", "flip")
_CROP_FIELDS = operator.attrgetter("top", "left", "resized_height", "resized_width", "flip")
_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
_COLUMN_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")


@dataclass(frozen=True, eq=False)
class DrawnCodes:
    """Codes of one view of each of a shard's n samples."""

    codes: np.ndarray
    """(n, K, h, w) uint16."""
    views: np.ndarray
    """Which view it is, (n,) int64."""
    damaged: frozenset[int]
    """Samples whose images were damaged: their codes mean nothing."""


@dataclass(frozen=True, eq=False)
class RecordTable:
    """Rows of one file, n in all."""

    keys: list[str]
    """Sample keys."""
    views: np.ndarray
    """View numbers, (n,) int8."""
    crops: np.ndarray
    """Which part of the image was used, (n, 5) int32: the fields of `CropRecord`, in order."""
    columns: dict[str, np.ndarray]
    """By teacher or codebook: (n, ...) float16 features or uint16 codes."""
    damaged: frozenset[int] = frozenset()
    """Rows whose images were damaged; their crops and columns mean nothing."""

    def __post_init__(self) -> None:
        if self.damaged and max(self.damaged) >= len(self):
            raise ValueError(f"damaged row {max(self.damaged)}: expected rows below {len(self)}")

    def __len__(self) -> int:
        return len(self.keys)


class _ColumnType(Config):
    """Shape and type of one row of a binary column."""

    dtype: Literal["float16", "uint16"]
    shape: list[Annotated[int, Field(ge=0, le=2**30)]] = Field(min_length=1, max_length=8)

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.shape)


class _Metadata(Config):
    """What a file's footer says."""

    format: Literal["fqgan-records-1"] = "fqgan-records-1"
    fingerprint: str
    shard_sha256: str
    num_rows: int = Field(ge=0, le=MAX_COUNT)
    content_sha256: str
    columns: dict[str, _ColumnType]
    damaged_rows: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ascending; left out where there are none, so that software from before reads the file."""


def pack_codes(codes: np.ndarray, codebooks: Sequence[str]) -> dict[str, np.ndarray]:
    """Split codes into one uint16 column per codebook.

    Args:
        codes: (B, K, h, w), whole numbers in [0, 65536).
        codebooks: K names.

    Raises:
        ValueError: another shape, or codes out of range.
    """
    if codes.ndim != 4 or codes.shape[1] != len(codebooks):
        raise ValueError(f"codes {codes.shape}: expected (B, {len(codebooks)}, h, w)")
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < MAX_CODEBOOK_SIZE:
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: expected [0, 65536)")
    return {name: codes[:, k].astype("<u2") for k, name in enumerate(codebooks)}


def pack_crops(crops: Sequence[CropRecord]) -> np.ndarray:
    """Give crops as rows of a `RecordTable`, (n, 5) int32."""
    return np.array([_CROP_FIELDS(crop) for crop in crops], np.int32).reshape(len(crops), 5)


def check_codebook_size(codebook_size: int) -> None:
    """Refuse codebooks whose codes do not fit into uint16.

    Raises:
        ConfigError: more than 65536 entries.
    """
    if codebook_size > MAX_CODEBOOK_SIZE:
        raise ConfigError(
            f"codebook_size: {codebook_size} codes do not fit into the 16 bits they are stored in; "
            f"expected at most {MAX_CODEBOOK_SIZE}"
        )


def encode_records(table: RecordTable, *, fingerprint: str, shard_sha256: str) -> bytes:
    """Write rows as a parquet file.

    Raises:
        ValueError: columns of other types or lengths, or unsafe names.
        DataError: a value is not finite (float16 ends at 65504).
    """
    columns = {
        name: _column_type(name, values, len(table)) for name, values in table.columns.items()
    }
    metadata = _Metadata(
        fingerprint=fingerprint,
        shard_sha256=shard_sha256,
        num_rows=len(table),
        content_sha256=_hash_content(table),
        columns=columns,
        damaged_rows=tuple(sorted(table.damaged)),
    )
    arrays: dict[str, pa.Array] = {
        "key": pa.array(table.keys, pa.string()),
        "view": pa.array(table.views, pa.int8()),
    }
    for name, values in zip(_FIXED_COLUMNS[2:], table.crops.T, strict=True):
        arrays[name] = pa.array(values, pa.int32())
    arrays["flip"] = arrays["flip"].cast(pa.bool_())
    for name, column in columns.items():
        # Not parquet's own fixed-size lists: these store uint16 as INT32, twice the size and 50
        # times slower to read.
        data = pa.py_buffer(table.columns[name].astype(f"<{column.dtype[0]}2").tobytes())
        arrays[name] = pa.Array.from_buffers(pa.binary(column.num_bytes), len(table), [None, data])
    left_out = None if table.damaged else {"damaged_rows"}
    footer = {_METADATA_KEY: metadata.model_dump_json(exclude=left_out).encode()}
    # Codes would shrink by 6 % and features by nothing, for a third of the time that reading takes.
    compression = dict.fromkeys(_FIXED_COLUMNS, "zstd") | dict.fromkeys(columns, "none")
    sink = io.BytesIO()
    pq.write_table(
        pa.table(arrays).replace_schema_metadata(footer),
        sink,
        compression=compression,  # pyright: ignore[reportArgumentType]  # the stubs lack dicts
        # A dictionary of features, all different, only costs. The stubs of pyarrow lack lists here.
        use_dictionary=list(_FIXED_COLUMNS[1:]),  # pyright: ignore[reportArgumentType]
    )
    return sink.getvalue()


def decode_records(
    data: bytes, *, fingerprint: str, shard_sha256: str, source: str, max_rows: int
) -> RecordTable:
    """Read and verify a parquet file of rows.

    Args:
        data: the file.
        fingerprint: what the rows must have been computed with.
        shard_sha256: the shard they must have been computed from.
        source: the file's name, for the error.
        max_rows: rows that there may be; a file of more is not read.

    Raises:
        DataError: not such a file, damaged, or computed with or from something else.
    """
    try:
        metadata = _read_metadata(data)
        parquet = read_table(data, _make_schema(metadata.columns), max_rows=max_rows)
        table = _read_table(parquet, metadata)
        content_sha256 = _hash_content(table)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{source}: not a file of records: {error}; delete it") from error
    if content_sha256 != metadata.content_sha256:
        raise DataError(f"{source}: not a file of records: its sha256 is wrong; delete it")
    for what, found, expected in (
        ("fingerprint", metadata.fingerprint, fingerprint),
        ("shard sha256", metadata.shard_sha256, shard_sha256),
        ("number of rows", metadata.num_rows, len(table)),
    ):
        if found != expected:
            raise DataError(
                f"{source}: {what} is {found!r}, expected {expected!r}; the file belongs to other "
                "weights, views or data: compute it again"
            )
    return table


def _read_metadata(data: bytes) -> _Metadata:
    footer: Mapping[bytes, bytes] = pq.read_metadata(io.BytesIO(data)).metadata or {}
    return _Metadata.model_validate_json(footer[_METADATA_KEY])


def _make_schema(columns: Mapping[str, _ColumnType]) -> pa.Schema:
    """Name the columns of a file and their types, as they are stored."""
    numbers = [(name, pa.int32()) for name in _FIXED_COLUMNS[1:]]
    binary = [(name, pa.binary(column.num_bytes)) for name, column in columns.items()]
    return pa.schema([("key", pa.string()), *numbers, *binary])


def _read_table(parquet: pa.Table, metadata: _Metadata) -> RecordTable:
    fixed = [parquet.column(name) for name in _FIXED_COLUMNS]
    if any(column.null_count for column in fixed):
        raise ValueError("a key, view or crop is missing")
    numbers = [column.to_numpy() for column in fixed[1:]]
    columns = {
        name: _read_binary(parquet.column(name), column)
        for name, column in metadata.columns.items()
    }
    views, damaged = numbers[0].astype(np.int8), frozenset(metadata.damaged_rows)
    if not np.array_equal(views, numbers[0]):
        raise ValueError(f"views from {numbers[0].min()} to {numbers[0].max()}")
    return RecordTable(fixed[0].to_pylist(), views, np.stack(numbers[1:], axis=1), columns, damaged)


def _hash_content(table: RecordTable) -> str:
    # Parquet's own checksums leave out its headers: of 24,616 flipped bits 7 went unnoticed.
    sums = hashlib.sha256("\n".join(table.keys).encode())
    sums.update(table.views.tobytes())
    sums.update(np.ascontiguousarray(table.crops, dtype="<i4").data)
    for name, values in table.columns.items():
        sums.update(name.encode())
        sums.update(np.ascontiguousarray(values, dtype=f"<{values.dtype.kind}2").data)
    if table.damaged:
        sums.update(np.array(sorted(table.damaged), dtype="<i8").data)
    return sums.hexdigest()


def _clear_rows(values: np.ndarray, rows: Collection[int]) -> np.ndarray:
    """Give values with zeros in some rows, so that equal damage gives equal files."""
    if not rows:
        return values
    cleared = values.copy()
    cleared[list(rows)] = 0
    return cleared


def _column_type(name: str, values: np.ndarray, num_rows: int) -> _ColumnType:
    if _COLUMN_NAME.fullmatch(name) is None or name in _FIXED_COLUMNS:
        raise ValueError(f"column {name!r}: expected a name of lower-case letters, digits and '_'")
    if values.dtype.name not in ("float16", "uint16") or values.ndim < 2 or len(values) != num_rows:
        raise ValueError(
            f"column {name!r}: {values.dtype} {values.shape}; "
            f"expected float16 or uint16 of shape ({num_rows}, ...)"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(
            f"column {name!r}: values that are not finite in float16; check the teacher"
        )
    dtype: Any = values.dtype.name
    return _ColumnType(dtype=dtype, shape=list(values.shape[1:]))


def _read_binary(column: pa.ChunkedArray, expected: _ColumnType) -> np.ndarray:
    if column.type != pa.binary(expected.num_bytes) or column.null_count:
        raise ValueError(f"a column of type {column.type}; expected {expected}")
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    values = np.frombuffer(array.buffers()[1], dtype=f"<{expected.dtype[0]}2")
    start = array.offset * expected.num_bytes // 2
    return values[start : start + len(array) * expected.num_bytes // 2].reshape(
        len(array), *expected.shape
    )


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
