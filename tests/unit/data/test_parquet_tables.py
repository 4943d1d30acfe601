from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fqgan_dist.data.index import SampleTable, decode_samples, encode_samples
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.errors import DataError

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("digest", pa.binary(16)),
        pa.field("file", pa.string()),
    ],
    metadata={"a": "b"},
)


def make_table(count: int, keys: Sequence[str] | None = None) -> pa.Table:
    keys = [f"k{n}" for n in range(count)] if keys is None else keys
    digests = pa.array([b"d" * 16] * count, pa.binary(16))
    columns = [keys, np.arange(count), digests, pa.nulls(count, pa.string())]
    return pa.Table.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA,
    )


def encode(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return sink.getvalue()


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_table_is_read_as_it_was_written(use_dictionary: bool) -> None:
    table = make_table(7)
    data = encode(table, use_dictionary=use_dictionary)
    assert read_table(data, SCHEMA, max_rows=7).equals(table, check_metadata=True)
    parts = encode(table, row_group_size=3)
    assert read_table(parts, SCHEMA, max_rows=3, row_group=1).equals(table.slice(3, 3))


def test_more_rows_than_expected_are_not_read() -> None:
    with pytest.raises(ValueError, match="7 rows; expected at most 6"):
        read_table(encode(make_table(7)), SCHEMA, max_rows=6)


def test_a_run_of_equal_numbers_asks_for_no_gigabytes() -> None:
    count = 20_000_000
    table = pa.table({"n": np.zeros(count, np.int64)})
    data = encode(table)
    assert len(data) < 200_000
    with pytest.raises(ValueError, match="a decompression bomb"):
        read_table(data, table.schema, max_rows=count)


def test_a_text_that_stands_in_all_rows_asks_for_no_gigabytes() -> None:
    count = 3000
    text = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * 10**6])
    table = make_table(count, [""] * count).set_column(0, "key", text)
    data = encode(table, store_schema=False)
    assert len(data) < 10_000
    with pytest.raises(ValueError, match="texts of 3000000000 bytes"):
        read_table(data, SCHEMA, max_rows=count)


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("size", pa.array(["1"]), "column 'size' is string; expected int64"),
        ("digest", pa.array([b"x" * 2**20], pa.binary(2**20)), "column 'digest' is fixed_size"),
        ("digest", pa.array([[1]]), "column 'digest' is list"),
        ("key", pa.array([5]), "column 'key' is int64"),
    ],
)
def test_other_kinds_of_columns_are_not_read(name: str, values: pa.Array, reason: str) -> None:
    table = make_table(1)
    table = table.set_column(table.schema.get_field_index(name), name, values)
    with pytest.raises(ValueError, match=reason):
        read_table(encode(table), SCHEMA, max_rows=1)
    with pytest.raises(ValueError, match="no columns"):
        read_table(encode(table.drop_columns([name])), SCHEMA, max_rows=1)


def test_a_row_group_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 row groups"):
        read_table(encode(make_table(1)), SCHEMA, max_rows=1, row_group=1)


def test_a_table_of_samples_is_compared_with_the_count_of_the_index_before_it_is_read() -> None:
    ones = np.ones(3, np.int64)
    table = SampleTable(["a", "b", "c"], ones, ones, ones, ones, ones, np.zeros((3, 16), np.uint8))
    data = encode_samples(table, {})
    assert len(decode_samples(data, source="x", max_rows=3)[0]) == 3
    with pytest.raises(DataError, match="x: not a table of samples: 3 rows; expected at most 2"):
        decode_samples(data, source="x", max_rows=2)


def test_a_column_whose_name_is_no_text_is_refused() -> None:
    data = encode(make_table(3))
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    damaged = data[:start] + data[start:].replace(b"key", b"k\xffy")
    with pytest.raises((ValueError, pa.ArrowException)):
        read_table(damaged, SCHEMA, max_rows=3)
