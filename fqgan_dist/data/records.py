"""Records: what was computed once per image and view (teacher features, codes), as parquet files.

A row is a key, a view, the crop it was computed from, and fixed-size binary columns of numbers,
little-endian. The file's metadata names what it was computed from: the fingerprint (weights,
preprocessing, views, dataset) and the sha256 of the shard. A reader refuses what does not fit.
It also lists the rows whose images were damaged, which hold zeros; without such rows it says
nothing of them, as files from before there was that list.
"""

from __future__ import annotations

import hashlib
import io
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from fqgan_dist.config import MAX_COUNT, Config
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import ConfigError, DataError

MAX_CODEBOOK_SIZE = 2**16
MAX_VIEWS = 2**7  # views are stored as int8

_METADATA_KEY = b"fqgan_records"
_FIXED_COLUMNS = ("key", "view", "crop_top", "crop_left", "resized_height", "resized_width", "flip")
_CROP_FIELDS = operator.attrgetter("top", "left", "resized_height", "resized_width", "flip")
_COLUMN_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")


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
