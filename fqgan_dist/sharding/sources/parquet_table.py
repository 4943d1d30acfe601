"""Parquet files with a column of encoded images, as Hugging Face's datasets are stored.

A row cannot be read alone, so the images are copied to a temporary file (in `TMPDIR`) first.
Nothing of Arrow's extension types is loaded: only plain columns are read.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.config import NO_CLASSES, THE_ONLY_CLASS, SourceOptions
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.file_names import PARQUET_SUFFIX, is_image_name
from fqgan_dist.sharding.labels import class_from_value, describe_missing_class
from fqgan_dist.sharding.listing import (
    MAX_IMAGE_BYTES,
    ListingBuilder,
    Place,
    SourceListing,
    find_danger,
    find_fault_of_class,
    show_name,
)
from fqgan_dist.sharding.problems import check_problem_count
from fqgan_dist.sharding.sources.locations import locate_existing_file, locate_files
from fqgan_dist.sharding.sources.readers import RangeReader
from fqgan_dist.sharding.sources.shard_pattern import is_pattern
from fqgan_dist.sharding.sources.splits import (
    SPLIT_COLUMNS,
    ChosenFiles,
    ChosenRows,
    choose_files,
    choose_rows,
    find_split_column,
)
from fqgan_dist.sharding.sources.spool import open_spool_folder, write_spool_file
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.terminal import printable

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "pixel_values")
_CLASS_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target")
_EXPECTED = {
    "image_key": "the bytes of images: binary, or a struct with a field `bytes`",
    "class_key": "classes: whole numbers or texts",
}
_WITHOUT_COLUMN = {
    "image_key": "where one names files, write it and the classes as CSV or JSONL, and name that "
    "as the source",
    "class_key": f"give class_key={NO_CLASSES} if the images have none",
}
# More at once would be faster by a tenth, but a value that stands in a dictionary once, so that a
# file of 2 kB expands to one page of 64 MiB, would be in memory as often as it is in a batch.
_BATCH_ROWS = 1
_BUFFER_BYTES = 2**20
# A row group's page is expanded in memory; no honest one of images is as large, or expands so much.
_MAX_ROW_GROUP_BYTES = 16 * 2**30
_MAX_EXPANSION = 100
_HARMLESS_BYTES = 2**30
_SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}


@contextmanager
def open_parquet(
    uri: str, options: SourceOptions, observer: Observer, *, split: str
) -> Iterator[SourceListing]:
    """List the images of a parquet file, of several by a pattern, or of a split's in a folder.

    A row's name is its class and the file name that is stored with its image, where all rows have
    one of their own; else the parquet file's name and the number of the row.

    Raises:
        ConfigError: the columns cannot be told.
        DataError: a file is missing or damaged, or there is no image.
    """
    storage, (files, other_splits) = _find_files(uri, split)
    columns = _choose_columns(uri, _read_schema(storage, files[0]), options)
    chosen = _choose_rows(uri, storage, files, columns, options, split)
    are_wanted = itertools.repeat(True) if chosen.are_kept is None else iter(chosen.are_kept)
    rows = _Rows(are_wanted)
    with open_spool_folder() as folder:
        for file in files:
            with observer.track(_count_rows(storage, file), "reading rows", "rows") as bar:
                images = _iterate_images(storage, file, columns, rows, bar)
                write_spool_file(folder / _spool_name(file), images, uri=uri)
        builder = ListingBuilder(uri, expected="rows with an image and a class")
        _add_rows(rows, builder, has_keys=columns.key is not None)
        listing = builder.build(
            "parquet",
            RangeReader(Storage(folder)),
            is_shared_by_nodes=False,
            classes=columns.class_names,
            class_descriptions=columns.class_descriptions,
        )
        yield replace(listing, other_splits=frozenset({*other_splits, *chosen.other_splits}))


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str | None
    key: str | None
    split: str | None
    class_names: list[str] | None
    class_descriptions: dict[str, str]


@dataclass
class _Rows:
    are_wanted: Iterator[bool]
    """Whether each row that comes is of the split asked for."""
    classes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """File name that is stored with the image; "" where there is none."""
    keys: list[str] = field(default_factory=list)
    row_names: list[str] = field(default_factory=list)
    """Name by the number of the row."""
    files: list[str] = field(default_factory=list)
    """Spooled file that holds the image."""
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    odd: list[tuple[str, str]] = field(default_factory=list)


def _find_files(uri: str, split: str) -> tuple[Storage, ChosenFiles]:
    if is_pattern(uri):
        storage, names = locate_files(uri)
        return storage, choose_files(uri, names, split)
    if uri.endswith(PARQUET_SUFFIX):
        storage, name, _ = locate_existing_file(uri)
        return storage, ChosenFiles([name], ())
    storage = Storage(uri)
    names = [
        name for name in storage.list() if name.endswith(PARQUET_SUFFIX) and not is_dropping(name)
    ]
    if not names:
        raise DataError(f"{uri}: no .parquet files; correct the path, or name another format")
    return storage, choose_files(uri, names, split)


def _spool_name(file: str) -> str:
    return f"{file}.images"


@contextmanager
def _open_file(storage: Storage, name: str) -> Iterator[pq.ParquetFile]:
    uri = storage.uri(name)
    try:
        with (
            storage.open_read(name) as stream,
            # Not buffered ahead: a column of images is gigabytes.
            pq.ParquetFile(stream, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file,
        ):
            yield file
    # The last three: a column's name or text that is no UTF-8, and times that Python does not have.
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
        raise DataError(f"{uri}: not a whole parquet file ({error}); copy it again") from error


def _read_schema(storage: Storage, name: str) -> pa.Schema:
    with _open_file(storage, name) as file:
        return file.schema_arrow


def _count_rows(storage: Storage, name: str) -> int:
    with _open_file(storage, name) as file:
        return file.metadata.num_rows


def _choose_columns(uri: str, schema: pa.Schema, options: SourceOptions) -> _Columns:
    """Tell which columns hold images, classes and keys.

    Raises:
        ConfigError: it cannot be told, or a named column is not there.
    """
    image = _choose(uri, "image_key", options.image_key, _IMAGE_COLUMNS, schema, _holds_bytes)
    label = None
    if options.class_key != NO_CLASSES:
        label = _choose(uri, "class_key", options.class_key, _CLASS_COLUMNS, schema, _holds_classes)
    if options.id_key is not None and options.id_key not in schema.names:
        raise ConfigError(f"id_key: {uri} has no column {options.id_key!r}, only {schema.names}")
    names, descriptions = (None, {}) if label is None else _read_class_names(schema, label)
    of_texts = [field.name for field in schema if _holds_texts(field.type)]
    split = find_split_column(uri, options.split_key, of_texts)
    return _Columns(
        image, label, options.id_key, None if split == label else split, names, descriptions
    )


def _choose(
    uri: str,
    option: Literal["image_key", "class_key"],
    given: str | None,
    usual: Sequence[str],
    schema: pa.Schema,
    can_be: Callable[[pa.DataType], bool],
) -> str:
    """Give the column that is named, or the only one that can be it, by its usual name if several.

    Raises:
        ConfigError: there is none, or more than one.
    """
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    possible = [field.name for field in schema if can_be(field.type)]
    if given is not None:
        if given in possible:
            return given
        fault = "holds something else" if given in schema.names else "is not there"
        raise ConfigError(
            f"{option}: the column {given!r} of {uri} {fault} ({columns}); expected one with "
            f"{_EXPECTED[option]}"
        )
    found = [name for name in possible if name in usual] or possible
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{uri}: the columns {', '.join(map(repr, found))} could each be meant; name one with "
            f"{option}={found[0]}"
        )
    raise ConfigError(
        f"{uri}: no column with {_EXPECTED[option]} ({columns}); {_WITHOUT_COLUMN[option]}"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_classes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_classes(kind.value_type)
    # Whole numbers are floating-point ones where pandas had a missing value among them.
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or _holds_texts(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_texts(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _read_class_names(schema: pa.Schema, column: str) -> tuple[list[str] | None, dict[str, str]]:
    """Read the names of a Hugging Face ClassLabel.

    Returns:
        The classes in the order of their labels, None where the file names none, and readable names
        of classes: names that cannot be ours (two of one name, a slash) describe numbers instead.
    """
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    try:
        names = parse_json(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None, {}
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        return None, {}
    names = [name.strip() for name in names]
    if len(set(names)) == len(names) and not any(map(find_fault_of_class, names)):
        return names, {}
    numbers = [str(label) for label in range(len(names))]
    return numbers, {number: printable(name) for number, name in zip(numbers, names, strict=True)}


def _iterate_images(
    storage: Storage, name: str, columns: _Columns, rows: _Rows, bar: ProgressBar
) -> Iterator[bytes]:
    """Yield the images of a file, and note the rows."""
    wanted = [column for column in (columns.image, columns.label, columns.key) if column]
    offset = number = 0
    with _open_file(storage, name) as file:
        uri, num_bytes = storage.uri(name), storage.size(name)
        _check_row_groups(file.metadata, num_bytes, uri)
        _check_columns(file, wanted, uri)
        limit = max(_HARMLESS_BYTES, _MAX_EXPANSION * num_bytes)
        for values in _iterate_rows(file, wanted):
            bar.advance()
            number += 1
            if not next(rows.are_wanted):
                continue
            data = _take_row(values, columns, name, number - 1, offset, rows)
            if data is None:
                latest = f"{rows.odd[-1][0]}: {rows.odd[-1][1]}"
                check_problem_count(uri, len(rows.odd), len(rows.files), latest=latest)
            if data:
                offset += len(data)
                if offset > limit:
                    raise DataError(
                        f"{uri}: a decompression bomb: its first {number} images "
                        f"have {offset} bytes, expected at most {limit} for a file of its size: do "
                        "not use it"
                    )
                yield data


def _iterate_rows(file: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
        yield {column: batch.column(column)[0].as_py() for column in batch.schema.names}


def _choose_rows(
    uri: str,
    storage: Storage,
    files: Sequence[str],
    columns: _Columns,
    options: SourceOptions,
    split: str,
) -> ChosenRows:
    """Keep the rows of a split, of all files together, by a column."""
    if columns.split is None:
        return ChosenRows(None, ())
    column, values = columns.split, list[Any]()
    for name in files:
        with _open_file(storage, name) as file:
            _check_row_groups(file.metadata, storage.size(name), storage.uri(name))
            _check_columns(file, {column}, storage.uri(name))
            values += [row[column] for row in _iterate_rows(file, [column])]
    is_certain = options.split_key is not None or column.lower() == SPLIT_COLUMNS[0]
    return choose_rows(uri, f"the column {column!r}", values, split, is_certain=is_certain)


def _check_columns(file: pq.ParquetFile, wanted: Collection[str], uri: str) -> None:
    names = file.schema_arrow.names
    if missing := sorted(set(wanted) - set(names)):
        raise DataError(
            f"{uri}: has no columns {missing}, unlike the first file; expected files of one kind: "
            "say with files= which are read together"
        )
    if repeated := sorted(name for name in set(wanted) if names.count(name) > 1):
        raise DataError(
            f"{uri}: has several columns {repeated}; expected one of each name: write it anew"
        )


def _check_row_groups(metadata: pq.FileMetaData, num_bytes: int, uri: str) -> None:
    limit = min(_MAX_ROW_GROUP_BYTES, max(_HARMLESS_BYTES, _MAX_EXPANSION * num_bytes))
    for number in range(metadata.num_row_groups):
        # Not its columns' sizes: to ask a damaged footer for a column can abort the process.
        size = metadata.row_group(number).total_byte_size
        if size > limit:
            raise DataError(
                f"{uri}: row group {number} expands from {num_bytes} to {size} bytes; expected "
                f"at most {limit}: a decompression bomb, or write it with smaller groups"
            )


def _take_row(
    values: Mapping[str, Any],
    columns: _Columns,
    file: str,
    number: int,
    offset: int,
    rows: _Rows,
) -> bytes | None:
    """Note a row.

    Returns:
        Its image, or None where it has none that is usable.
    """
    row_name = f"{file.removesuffix(PARQUET_SUFFIX)}-{number:08d}"
    spool_file = _spool_name(file)
    image = values[columns.image]
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, "")
    key = values[columns.key] if columns.key else ""
    class_name = THE_ONLY_CLASS if columns.label is None else _find_class(values, columns)
    if class_name is None:
        rows.odd.append((row_name, describe_missing_class(values[str(columns.label)])))
        return None
    extension = _find_extension(data) if isinstance(data, bytes) else None
    if not isinstance(data, bytes) or extension is None or len(data) > MAX_IMAGE_BYTES:
        what = f"{len(data)} bytes that are no JPEG, PNG or WebP" if data else "no bytes"
        if not data and path:
            what = f"only the path {show_name(str(path))!r}, which is not followed"
        rows.odd.append((row_name, f"{what}; expected an image in the column {columns.image!r}"))
        return None
    if key is None:
        rows.odd.append((row_name, f"no key in the column {columns.key!r}, as other rows have"))
        return None
    rows.classes.append(class_name)
    rows.names.append(_safe_file_name(path))
    rows.keys.append(str(key))
    rows.row_names.append(f"{row_name}.{extension}")
    rows.files.append(spool_file)
    rows.offsets.append(offset)
    rows.sizes.append(len(data))
    return data


def _find_class(values: Mapping[str, Any], columns: _Columns) -> str | None:
    value = values[str(columns.label)]
    if columns.class_names is None or not isinstance(value, int):
        return class_from_value(value)
    # -1 is Hugging Face's "no label", as in test splits.
    return columns.class_names[value] if 0 <= value < len(columns.class_names) else None


def _find_extension(data: bytes) -> str | None:
    return next((name for start, name in _SIGNATURES.items() if data.startswith(start)), None)


def _safe_file_name(path: Any) -> str:
    """Give the last part of a stored path; the folders are of somebody else's machine."""
    name = PurePosixPath(path).name if isinstance(path, str) else ""
    return name if name and find_danger(name) is None and is_image_name(name) else ""


def _add_rows(rows: _Rows, builder: ListingBuilder, *, has_keys: bool) -> None:
    pairs = list(zip(rows.classes, rows.names, strict=True))
    has_names = all(rows.names) and len(set(pairs)) == len(pairs)
    names = rows.names if has_names else rows.row_names
    for row, file in enumerate(rows.files):
        key = rows.keys[row] if has_keys else None
        place = Place(file, rows.offsets[row], rows.sizes[row])
        builder.add_labelled(
            rows.classes[row], names[row], place, key=key, shown_name=rows.row_names[row]
        )
    for name, reason in rows.odd:
        builder.skip(name, reason)
