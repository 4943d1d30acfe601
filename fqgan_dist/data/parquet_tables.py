"""Tables of ours in parquet, looked at before they are read.

A file of 2 MB can ask for gigabytes: a run of a billion equal numbers takes a few bytes, and so
does a text that stands in a dictionary once and in all rows. So the footer's rows and types are
compared with what is expected first, and texts are read as dictionaries and measured before they
are written out.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_TEXT_BYTES = 4000
"""Mean length of a row's texts: names of 1000 characters of four bytes."""

_HARMLESS_BYTES = 2**26
_MAX_EXPANSION = 100


def read_table(
    source: bytes | BinaryIO,
    schema: pa.Schema,
    *,
    max_rows: int,
    row_group: int | None = None,
    metadata: pq.FileMetaData | None = None,
) -> pa.Table:
    """Read the columns of a schema, with the file's own text metadata.

    Args:
        source: the file.
        schema: the columns, of numbers, texts and binary values of fixed width.
        max_rows: rows that there may be.
        row_group: the one that is read; None: all.
        metadata: the footer, if it was read before.

    Raises:
        ValueError: more rows, other columns, more bytes than an honest file expands to, or no value
            where there must be one.
        pa.ArrowException, OSError: it is no such file, or damaged.
    """
    try:
        return _read_table(source, schema, max_rows, row_group, metadata)
    except KeyError as error:  # pyarrow's, of a column whose name is no text
        raise ValueError(f"its columns cannot be told: {error}") from error


def _read_table(
    source: bytes | BinaryIO,
    schema: pa.Schema,
    max_rows: int,
    row_group: int | None,
    metadata: pq.FileMetaData | None,
) -> pa.Table:
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    texts = [field.name for field in schema if _is_text(field.type)]
    footer = pq.read_metadata(stream) if metadata is None else metadata
    if missing := sorted(set(schema.names) - set(footer.schema.to_arrow_schema().names)):
        raise ValueError(f"no columns {missing}")
    # Not `read_table`: a thread of its dataset layer lets go of the Python object later, and a
    # process that ends at that moment aborts ("terminate called", 1 in 20, pyarrow 26).
    with pq.ParquetFile(
        stream, metadata=footer, read_dictionary=texts, page_checksum_verification=True
    ) as file:
        num_bytes = stream.seek(0, io.SEEK_END)
        _check_footer(file, schema, row_group, max_rows, num_bytes)
        names = schema.names
        table = (
            file.read(columns=names, use_threads=False)
            if row_group is None
            else file.read_row_group(row_group, columns=names, use_threads=False)
        )
    limit = max(_HARMLESS_BYTES, MAX_TEXT_BYTES * len(table))
    columns = [_write_out(table.column(field.name), field.type, limit) for field in schema]
    for field, column in zip(schema, columns, strict=True):
        if column.null_count and not field.nullable:
            raise ValueError(f"column {field.name!r}: a value is missing")
    return pa.Table.from_arrays(columns, schema=pa.schema(schema, metadata=table.schema.metadata))


def _check_footer(
    file: pq.ParquetFile, schema: pa.Schema, row_group: int | None, max_rows: int, num_bytes: int
) -> None:
    footer = file.metadata
    if row_group is not None and not row_group < footer.num_row_groups:
        raise ValueError(f"{footer.num_row_groups} row groups; expected more")
    groups = range(footer.num_row_groups) if row_group is None else [row_group]
    num_rows = sum(footer.row_group(number).num_rows for number in groups)
    if num_rows > max_rows:
        raise ValueError(f"{num_rows} rows; expected at most {max_rows}")
    found = file.schema_arrow
    width = 0
    for field in schema:
        if found.names.count(field.name) != 1:
            raise ValueError(f"several columns {field.name!r}; expected one")
        kind = found.field(field.name).type
        if not _is_alike(kind, field.type):
            raise ValueError(f"column {field.name!r} is {kind}; expected {field.type}")
        width += 4 if _is_text(field.type) else kind.bit_width // 8
    # Not the columns' own sizes: to ask a damaged footer for a column can abort the process.
    packed = sum(footer.row_group(number).total_byte_size for number in groups)
    limit = max(_HARMLESS_BYTES, _MAX_EXPANSION * num_bytes)
    if max(packed, num_rows * width) > limit:
        raise ValueError(
            f"a decompression bomb: {num_rows} rows of {width} bytes, {packed} bytes of pages, in "
            f"a file of {num_bytes}"
        )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_binary(kind)


def _is_alike(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether a column can be cast to the expected one without growing."""
    if _is_text(expected):
        return pa.types.is_dictionary(found) and found.value_type == expected
    return found == expected or (pa.types.is_primitive(found) and pa.types.is_primitive(expected))


def _write_out(column: pa.ChunkedArray, kind: pa.DataType, limit: int) -> pa.ChunkedArray:
    if not pa.types.is_dictionary(column.type):
        return column.cast(kind)
    column.validate(full=True)  # no place beyond the dictionary
    num_bytes = sum(map(_count_text_bytes, column.chunks))
    if num_bytes > limit:
        raise ValueError(f"texts of {num_bytes} bytes; expected at most {limit}")
    return column.cast(kind)


def _count_text_bytes(chunk: pa.DictionaryArray) -> int:
    lengths = pc.call_function("binary_length", [chunk.dictionary]).take(chunk.indices)
    return pc.call_function("sum", [lengths]).as_py() or 0
