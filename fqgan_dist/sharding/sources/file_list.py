"""A CSV, TSV or JSONL list of files with their classes.

Columns are `path`, `class` (or `label`) and perhaps `key`. Paths are relative to a folder; absolute
ones, those that leave it and URLs are refused by name.
"""

from __future__ import annotations

import csv
import io
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.labels import class_from_value, describe_missing_class
from fqgan_dist.sharding.listing import (
    IMAGE_SUFFIXES,
    ListingBuilder,
    Place,
    SourceListing,
    find_danger,
    is_image_name,
)
from fqgan_dist.sharding.sources.locations import locate_existing_file
from fqgan_dist.sharding.sources.options import NO_CLASSES, THE_ONLY_CLASS, SourceOptions
from fqgan_dist.sharding.sources.readers import FileReader
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.links import RefusedObjectError, find_fault_of_link
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.progress import ProgressBar

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")

_PATH_COLUMNS = ("path", "file", "file_name", "filename", "image")
_CLASS_COLUMNS = ("class", "label", "class_name", "cls")
_KEY_COLUMNS = ("key",)
_MAX_LINE_BYTES = 2**20

Row = Mapping[str, Any]


def list_named_files(uri: str, options: SourceOptions, observer: Observer) -> SourceListing:
    """List the files that a manifest names.

    Raises:
        ConfigError: the columns cannot be told, or `root` is no folder.
        DataError: the manifest is missing or no text of its kind, or names no image that is there.
    """
    manifest_storage, name, _ = locate_existing_file(uri)
    storage = manifest_storage if options.root is None else Storage(options.root)
    builder = ListingBuilder(uri, expected="rows with the path and class of an image")
    with (
        manifest_storage.open_read(name) as file,
        observer.track(None, "reading rows", "rows") as bar,
    ):
        rows = _read_rows(file, uri)
        wanted = _check_rows(rows, uri, options, builder, bar)
    with observer.track(len(wanted), "looking for files", "files") as bar:
        sizes, faults = _measure(storage, [path for _, path, _ in wanted], bar)
    for class_name, path, key in wanted:
        size = sizes.get(path)
        if path in faults:
            builder.refuse(path, faults[path])
            continue
        if size is None:
            builder.skip(path, "no such file")
            continue
        # As in class folders, where that is what it is: the same images make the same dataset.
        rest = path.removeprefix(f"{class_name}/")
        builder.add_labelled(class_name, rest, Place(path, 0, size), key=key, shown_name=path)
    return builder.build(
        "manifest",
        FileReader(storage),
        is_shared_by_nodes=options.is_shared or not storage.is_local,
    )


class _Columns:
    """Which columns of a manifest hold what."""

    def __init__(self, uri: str, names: Sequence[str], options: SourceOptions) -> None:
        self._path = _choose(uri, "image_key", options.image_key, _PATH_COLUMNS, names)
        self._class = None
        if options.class_key != NO_CLASSES:
            self._class = _choose(uri, "class_key", options.class_key, _CLASS_COLUMNS, names)
        self._key = None
        if options.id_key is not None or "key" in names:
            self._key = _choose(uri, "id_key", options.id_key, _KEY_COLUMNS, names)
        self.has_keys = self._key is not None and options.keep_keys

    def path_of(self, row: Row) -> Any:
        """Give the path as it stands there."""
        return row.get(self._path)

    def label_of(self, row: Row) -> Any:
        """Give the class as it stands there."""
        return THE_ONLY_CLASS if self._class is None else row.get(self._class)

    def key_of(self, row: Row) -> str | None:
        """Give the key, if rows have keys and this one has."""
        value = row.get(self._key) if self._key is not None and self.has_keys else None
        return None if value in (None, "") else str(value)


def _choose(
    uri: str, option: str, given: str | None, usual: Sequence[str], names: Sequence[str]
) -> str:
    """Give the column that is named, or the first of the usual ones.

    Raises:
        ConfigError: there is none.
    """
    found = [name for name in (usual if given is None else (given,)) if name in names]
    if not found:
        expected = repr(given) if given is not None else f"one of {list(usual)}"
        raise ConfigError(
            f"{option}: {uri} has the columns {list(names)}; expected {expected}: "
            f"name one with {option}=..."
        )
    return found[0]


def _check_rows(
    rows: Iterator[Row],
    uri: str,
    options: SourceOptions,
    builder: ListingBuilder,
    bar: ProgressBar,
) -> list[tuple[str, str, str | None]]:
    """Give class, path and key of the rows that may be read."""
    first = next(rows, None)
    if first is None:
        raise DataError(f"{uri}: no rows; expected a header, and the columns path and class")
    columns = _Columns(uri, list(first), options)
    wanted: list[tuple[str, str, str | None]] = []
    for number, row in enumerate(itertools.chain([first], rows), 1):
        path, key = columns.path_of(row), columns.key_of(row)
        class_name = class_from_value(columns.label_of(row))
        if reason := _find_danger_of_path(path):
            builder.refuse(str(path), f"row {number}: {reason}")
        elif builder.skip_dropping(path):
            pass
        elif class_name is None:
            builder.skip(path, f"row {number}: {describe_missing_class(columns.label_of(row))}")
        elif not is_image_name(path):
            builder.skip(path, f"not named as an image ({', '.join(IMAGE_SUFFIXES)})")
        elif columns.has_keys and key is None:
            builder.skip(path, f"row {number}: no key, as other rows have")
        else:
            wanted.append((class_name, _normalize(path), key))
        bar.advance()
    return wanted


def _find_danger_of_path(path: Any) -> str | None:
    """Say why a path must not be opened; None if it may be."""
    if not isinstance(path, str) or not path:
        return "no path"
    if re.match(r"(data|file|pipe):|[A-Za-z][A-Za-z0-9+.-]*:/", path):
        return "a URL or drive; expected a path below the root"
    return find_danger(path)


def _normalize(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _read_rows(file: BinaryIO, uri: str) -> Iterator[Row]:
    """Yield the rows of a manifest.

    Raises:
        DataError: it is no text of its kind.
    """
    try:
        if uri.endswith((".jsonl", ".ndjson")):
            yield from _read_json_lines(_read_lines(file, uri), uri)
        else:
            dialect = csv.excel_tab if uri.endswith(".tsv") else csv.excel
            # A file of its own line breaks: a quoted field may hold one.
            for row in csv.DictReader(_read_lines(file, uri), dialect=dialect, strict=True):
                row.pop(None, None)  # surplus fields
                yield row
    except (csv.Error, UnicodeDecodeError, io.UnsupportedOperation) as error:
        raise DataError(f"{uri}: not readable as a table ({error}); write it anew") from error


def _read_lines(file: BinaryIO, uri: str) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(f"{uri}: line {number} is longer than {_MAX_LINE_BYTES} bytes")
        # A byte order mark, as spreadsheets write it, is no part of the first column's name.
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def _read_json_lines(lines: Iterable[str], uri: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{uri}: line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{uri}: line {number} is no JSON object; expected path and class")
        yield row


def _measure(
    storage: Storage, paths: Sequence[str], bar: ProgressBar
) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """Give the sizes of the files that are there, and why others are refused."""
    if storage.is_local:
        return _measure_files(storage, paths, bar)
    # One request lists a thousand objects; one request each would take hours for a million.
    wanted = set(paths)
    folder = posixpath.commonpath([posixpath.dirname(path) for path in wanted]) if wanted else ""
    sizes: dict[str, int] = {}
    prefix = f"{folder}/" if folder else ""
    for name, size in storage.child(folder).walk():
        if prefix + name in wanted:
            sizes[prefix + name] = size
            bar.advance()
    return sizes, {}


def _measure_files(
    storage: Storage, paths: Sequence[str], bar: ProgressBar
) -> tuple[dict[str, int], dict[str, str]]:
    sizes: dict[str, int] = {}
    faults: dict[str, str] = {}
    for path in paths:
        try:
            sizes[path] = storage.size(path)
        except FileNotFoundError:
            pass
        except RefusedObjectError:
            fault = find_fault_of_link(storage.uri(path), storage.root)
            faults[path] = fault or "no regular file"
        bar.advance()
    return sizes, faults
