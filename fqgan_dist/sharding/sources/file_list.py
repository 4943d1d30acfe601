"""A list of images with their classes, in any of the usual spellings.

- CSV, TSV or JSONL with the columns `path`, `class` (or `label`) and perhaps `key`; Kaggle's
  `ImageId,PredictionString`, whose first word is the class. A first row that holds the name of an
  image is no header: the name is the path, the first other field the class (tiny-imagenet's
  `val_annotations.txt`).
- Text: `path class` per line, as caffe has it; or only a class per line, of the images in the order
  of their sorted names (ImageNet's devkit).

Paths are relative to a folder; absolute ones, those that leave it and URLs are refused by name.
"""

from __future__ import annotations

import csv
import io
import itertools
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.config import ALL_ROWS, NO_CLASSES, THE_ONLY_CLASS, SourceOptions
from fqgan_dist.sharding.file_names import IMAGE_SUFFIXES, is_image_name
from fqgan_dist.sharding.labels import class_from_value, describe_missing_class
from fqgan_dist.sharding.listing import find_danger
from fqgan_dist.sharding.sources.splits import (
    SPLIT_COLUMNS,
    ChosenRows,
    choose_rows,
    find_split_column,
    is_split,
)
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.telemetry.progress import ProgressBar

_TEXT_SUFFIX = ".txt"
_JSON_SUFFIXES = (".jsonl", ".ndjson")
_KAGGLE_CLASS_COLUMN = "PredictionString"
_PATH_COLUMNS = ("path", "file", "file_name", "filename", "image", "ImageId")
_CLASS_COLUMNS = ("class", "label", "class_name", "cls", _KAGGLE_CLASS_COLUMN)
_KEY_COLUMNS = ("key",)
_CLASS_ALONE = "class of the next image"
_MAX_LINE_BYTES = 2**20
_IMAGE_AND_CLASS = re.compile(
    rf"(.+(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))\s+(\S.*)", re.IGNORECASE
)
# So many images, each of a class of its own in the order of the list, are no coincidence.
_MIN_RUNNING_COUNT = 10

Fields = Mapping[str, Any]


class ImageRow(NamedTuple):
    """What a list says of one image."""

    number: int
    """Number of the row, from 1, without a header."""
    path: str
    """Path of the image, perhaps without the ending; as it stands there where it is faulty."""
    class_name: str | None
    """Its class."""
    key: str | None
    """Its key, where the list gives keys."""
    fault: str | None
    """Why the row cannot be used; None if it can."""
    is_dangerous: bool = False
    """Whether the path must not be opened."""


@dataclass(frozen=True)
class ImageList:
    """The rows of a list."""

    uri: str
    """The list, for messages."""
    rows: list[ImageRow]
    """All rows."""
    has_paths: bool
    """Whether the rows name images; else they are of the images in the order of their names."""
    other_splits: Collection[str] = ()
    """The usual names of the splits whose rows are left out."""

    @property
    def start(self) -> str:
        """The folder that all images lie in, as far as the paths tell; "" is the root."""
        paths = [row.path for row in self.rows if not row.is_dangerous]
        # The image of a bare name may lie in any folder.
        if not self.has_paths or not all("/" in path for path in paths):
            return ""
        return posixpath.commonpath([posixpath.dirname(path) for path in paths]) if paths else ""


def read_image_list(
    file: BinaryIO, uri: str, options: SourceOptions, bar: ProgressBar, *, split: str
) -> ImageList:
    """Read a list.

    Args:
        file: the list.
        uri: its name, which tells its spelling.
        options: which columns are what.
        bar: counts the rows.
        split: which rows are read, where there are some of several splits.

    Raises:
        ConfigError: the columns cannot be told, or the rows of the split.
        DataError: it is no text of its kind, or empty.
    """
    rows = _read_fields(file, uri)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{uri}: no rows; expected a header, and the columns path and class")
    has_paths = _CLASS_ALONE not in first
    columns = _Columns(uri, list(first), options, has_paths=has_paths)
    found: list[ImageRow] = []
    splits: list[Any] = []
    for number, fields in enumerate(itertools.chain([first], rows), 1):
        found.append(columns.parse(number, fields))
        splits.append(None if columns.split is None else fields.get(columns.split))
        bar.advance()
    if not has_paths:
        return ImageList(uri, found, has_paths)
    chosen = _choose_split(uri, found, splits, columns.split, options, split)
    if chosen.are_kept is not None:
        found = list(itertools.compress(found, chosen.are_kept))
    _check_running_count(uri, found)
    return ImageList(uri, found, has_paths, chosen.other_splits)


def _choose_split(
    uri: str,
    rows: Sequence[ImageRow],
    splits: Sequence[Any],
    column: str | None,
    options: SourceOptions,
    split: str,
) -> ChosenRows:
    """Keep the rows of a split, by a column or by a folder of the paths.

    Args:
        uri: the list.
        rows: all of its rows.
        splits: what they have in the column.
        column: that says which split a row is of; None: there is none.
        options: of the source.
        split: which is asked for.
    """
    everything = ChosenRows(None, ())
    if options.split_key == ALL_ROWS:
        return everything
    # What must not be opened is named, whatever it is of.
    sound = [row for row in rows if not row.is_dangerous]
    chosen = everything
    if column is not None:
        values = [splits[row.number - 1] for row in sound]
        is_certain = options.split_key is not None or column.lower() == SPLIT_COLUMNS[0]
        where = f"the column {column!r}"
        chosen = choose_rows(uri, where, values, split, is_certain=is_certain)
    if chosen.are_kept is None:
        folders = _find_split_folders([row.path for row in sound])
        chosen = choose_rows(uri, "folders of the paths", folders, split, is_certain=False)
    if chosen.are_kept is None:
        return everything
    left_out = {
        row.number for row, is_kept in zip(sound, chosen.are_kept, strict=True) if not is_kept
    }
    return chosen._replace(are_kept=[row.number not in left_out for row in rows])


def _find_split_folders(paths: Iterable[str]) -> list[str]:
    """Give a folder of each path that is called as splits are, the first where there are several.

    All are of one depth: a class may be called so as well.
    """
    folders = [path.split("/")[:-1] for path in paths]
    for level in range(min(map(len, folders), default=0)):
        names = [each[level] for each in folders]
        if all(map(is_split, names)):
            return names
    return []


class _Columns:
    """Which columns of a list hold what."""

    def __init__(
        self, uri: str, names: Sequence[str], options: SourceOptions, *, has_paths: bool
    ) -> None:
        self._path = None
        if has_paths:
            self._path = _choose(uri, "image_key", options.image_key, _PATH_COLUMNS, names)
        self._class = None
        usual = _CLASS_COLUMNS if has_paths else (_CLASS_ALONE,)
        if options.class_key != NO_CLASSES:
            self._class = _choose(uri, "class_key", options.class_key, usual, names)
        elif not has_paths:
            raise ConfigError(
                f"class_key: {NO_CLASSES!r}: {uri} holds nothing but classes; name the images as "
                "the source"
            )
        self._key = None
        if options.id_key is not None or "key" in names:
            self._key = _choose(uri, "id_key", options.id_key, _KEY_COLUMNS, names)
        self._has_keys = self._key is not None and options.keep_keys
        taken = (self._path, self._class, self._key)
        others = [name for name in names if name not in taken]
        self.split = find_split_column(uri, options.split_key, others)

    def parse(self, number: int, fields: Fields) -> ImageRow:
        """Give what a row says."""
        class_name = class_from_value(self._label_of(fields))
        key = self._key_of(fields)
        fault = None
        if class_name is None:
            fault = f"row {number}: {describe_missing_class(self._label_of(fields))}"
        elif self._has_keys and key is None:
            fault = f"row {number}: no key, as other rows have"
        if self._path is None:
            return ImageRow(number, f"row {number}", class_name, key, fault)
        path: Any = fields.get(self._path)
        if danger := _find_danger_of_path(path):
            return ImageRow(number, str(path), None, None, f"row {number}: {danger}", True)
        return ImageRow(number, _normalize(str(path)), class_name, key, fault)

    def _label_of(self, fields: Fields) -> Any:
        if self._class is None:
            return THE_ONLY_CLASS
        value = fields.get(self._class)
        if self._class == _KAGGLE_CLASS_COLUMN and isinstance(value, str):
            return next(iter(value.split()), "")  # the boxes of the objects follow
        return value

    def _key_of(self, fields: Fields) -> str | None:
        value = fields.get(self._key) if self._key is not None and self._has_keys else None
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


def _check_running_count(uri: str, rows: Sequence[ImageRow]) -> None:
    """Refuse lists that number their rows, as the `ImageSets` of ILSVRC do.

    Raises:
        DataError: the classes would be 1, 2, 3, ..., each of one image.
    """
    counted = (row.class_name == str(row.number) for row in rows)
    if len(rows) >= _MIN_RUNNING_COUNT and all(counted):
        raise DataError(
            f"{uri}: numbers its {len(rows)} rows 1, 2, 3, ..., which are no classes; expected the "
            "class of each image beside its name: take another list, such as LOC_val_solution.csv"
        )


def _find_danger_of_path(path: Any) -> str | None:
    """Say why a path must not be opened; None if it may be."""
    if not isinstance(path, str) or not path:
        return "no path"
    if re.match(r"(data|file|pipe):|[A-Za-z][A-Za-z0-9+.-]*:/", path):
        return "a URL or drive; expected a path below the root"
    return find_danger(path)


def _normalize(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _read_fields(file: BinaryIO, uri: str) -> Iterator[Fields]:
    """Yield the rows as columns.

    Raises:
        DataError: it is no text of its kind.
    """
    lines = _read_lines(file, uri)
    try:
        if uri.endswith(_JSON_SUFFIXES):
            yield from _read_json_lines(lines, uri)
        elif uri.endswith(_TEXT_SUFFIX):
            yield from _read_text(lines)
        else:
            yield from _read_table(lines, "\t" if uri.endswith(".tsv") else ",")
    except (csv.Error, UnicodeDecodeError, io.UnsupportedOperation) as error:
        raise DataError(f"{uri}: not readable as a table ({error}); write it anew") from error


def _read_table(lines: Iterable[str], delimiter: str) -> Iterator[Fields]:
    # A file of its own line breaks: a quoted field may hold one.
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    first = next((row for row in rows if row), None)
    if first is None:
        return
    images = [position for position, value in enumerate(first) if is_image_name(value)]
    names = first if not images else _name_columns(len(first), images[0])
    for row in itertools.chain([first] if images else [], rows):
        if row:
            # Surplus fields are left out, missing ones are None.
            yield dict(itertools.zip_longest(names, row[: len(names)]))


def _name_columns(count: int, path: int) -> list[str]:
    """Name the columns of a table without a header: one is the path, the first other the class."""
    others = [_CLASS_COLUMNS[0], *(f"field {number}" for number in range(2, count))]
    return [*others[:path], _PATH_COLUMNS[0], *others[path:]]


def _read_text(lines: Iterator[str]) -> Iterator[Fields]:
    num_empty = 0
    for first in lines:
        if first.strip():
            break
        num_empty += 1
    else:
        return
    lines = itertools.chain([first], lines)
    is_one_word = len(first.split()) == 1
    if "\t" in first:
        yield from _read_table(lines, "\t")
    elif is_image_name(first.rpartition(",")[0]) or (is_one_word and "," in first):
        yield from _read_table(lines, ",")
    elif not is_one_word:
        for line in filter(str.strip, lines):
            named = _IMAGE_AND_CLASS.fullmatch(line.strip())
            path, *label = named.groups() if named else line.strip().rsplit(None, 1)
            yield {_PATH_COLUMNS[0]: path, _CLASS_COLUMNS[0]: "".join(label)}
    elif is_image_name(first.strip()):
        for line in filter(str.strip, lines):
            yield {_PATH_COLUMNS[0]: line.strip()}
    else:
        # An empty line is an image without a label, but for those at the end.
        for line in lines:
            if not line.strip():
                num_empty += 1
                continue
            yield from ({_CLASS_ALONE: ""} for _ in range(num_empty))
            num_empty = 0
            yield {_CLASS_ALONE: line.strip()}


def _read_lines(file: BinaryIO, uri: str) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > _MAX_LINE_BYTES:
            raise DataError(f"{uri}: line {number} is longer than {_MAX_LINE_BYTES} bytes")
        # A byte order mark, as spreadsheets write it, is no part of the first column's name.
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def _read_json_lines(lines: Iterable[str], uri: str) -> Iterator[Fields]:
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
