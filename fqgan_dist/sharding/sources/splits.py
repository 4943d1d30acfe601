"""Which split the files and folders of a source belong to, where their names say so."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.config import ALL_ROWS
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.file_names import ARCHIVE_SUFFIXES, LIST_SUFFIXES, is_image_name
from fqgan_dist.sharding.sources.shard_pattern import is_glob, is_pattern
from fqgan_dist.storage.storage import Storage, locate_file

_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_SPLIT = re.compile(rf"(?:^|(?<=[-_.]))({'|'.join(_NAMES)})(?=$|[-_.{{*?\d])", re.IGNORECASE)
_ENDINGS = (*ARCHIVE_SUFFIXES, *LIST_SUFFIXES)
_COUNT = re.compile(r"\{\d+\.\.\d+\}|[*?\d]+")
_EXAMINED_NAMES = 20
_SHOWN_NAMES = 3

logger = logging.getLogger(__name__)


def name_split(text: str) -> str:
    """Give a split its usual name, `train`, `val` or `test`; another name stays as it is."""
    return _NAMES.get(text.lower(), text)


def is_split(text: str) -> bool:
    """Whether a folder of this name holds a split."""
    return text.lower() in _NAMES


def split_of(file: str) -> str | None:
    """Give the split that a file's name tells, as in `train-00000-of-00294.parquet`."""
    found = _SPLIT.search(file)
    return name_split(found[1]) if found else None


class ChosenFiles(NamedTuple):
    """The files of one split."""

    files: list[str]
    """Their names."""
    other_splits: Collection[str]
    """The usual names of the splits whose files lie beside them."""


def choose_files(uri: str, files: Sequence[str], split: str) -> ChosenFiles:
    """Keep the files of a split, where there are files of several.

    Args:
        uri: the folder, or a pattern; where it names each file, all are meant.
        files: names of the files.
        split: the split that is asked for.

    Raises:
        ConfigError: none is of this split, or some do not say what they are of.
    """
    found = group_by_split(files)
    are_named = is_pattern(uri) and not is_glob(uri.rpartition("/")[2])
    if len(found) <= 1 or are_named:
        return ChosenFiles(list(files), ())
    chosen = found.get(name_split(split))
    if chosen is None or None in found:
        raise ConfigError(
            f"{uri}: holds files of several splits ({describe_splits(found)}), asked for is "
            f"{split!r}; name the files with a pattern such as train-*.parquet or "
            "train-{0000..0146}.tar"
        )
    others = sorted(str(name) for name in found if name != name_split(split))
    logger.info(
        "%s: %d files of %s are read; those of %s are not",
        uri,
        len(chosen),
        split,
        ", ".join(others),
    )
    return ChosenFiles(chosen, others)


SPLIT_COLUMNS = ("split", "subset", "partition", "set", "data set", "dataset", "data_set")
"""What columns are called that say which split a row is of, in small letters."""


class ChosenRows(NamedTuple):
    """The rows of one split."""

    are_kept: Sequence[bool] | None
    """For each row whether it is one of them; None: all are."""
    other_splits: Collection[str]
    """The usual names of the splits of the others."""


def find_split_column(uri: str, given: str | None, names: Sequence[str]) -> str | None:
    """Give the column that says which split a row is of; None: there is none, or all are meant.

    Raises:
        ConfigError: the given one is not there.
    """
    if given == ALL_ROWS:
        return None
    if given is not None:
        if given not in names:
            raise ConfigError(
                f"split_key: {uri} has the columns {list(names)}, none is {given!r}; correct it, "
                f"or give split_key={ALL_ROWS} if all rows are meant"
            )
        return given
    usual = {name.strip().lower(): name for name in reversed(names)}
    return next((usual[name] for name in SPLIT_COLUMNS if name in usual), None)


def choose_rows(
    uri: str, where: str, values: Iterable[Any], split: str, *, is_certain: bool
) -> ChosenRows:
    """Keep the rows of a split, where there are rows of several.

    Args:
        uri: the table or list.
        where: where the values stand, for messages.
        values: the split of each row; None or empty: it says none.
        split: the split that is asked for.
        is_certain: whether these are splits whatever they are called; else only if all are called
            as splits are.

    Raises:
        ConfigError: no row is of this split, or some do not say what they are of.
    """
    names = ["" if value is None else name_split(str(value).strip()) for value in values]
    counts = Counter(names)
    if len(counts) <= 1 or not (is_certain or all(map(is_split, counts))):
        return ChosenRows(None, ())
    wanted = name_split(split)
    found = ", ".join(f"{name or 'none'}: {count}" for name, count in sorted(counts.items()))
    if "" in counts or wanted not in counts:
        raise ConfigError(
            f"{uri}: has rows of several splits by {where} ({found}), asked for is {split!r}; "
            f"write the rows of one split to a file of their own, or give split_key={ALL_ROWS} if "
            "all are meant"
        )
    logger.info("%s: the rows of %s are read, by %s (%s)", uri, split, where, found)
    return ChosenRows([name == wanted for name in names], sorted(counts.keys() - {wanted}))


def group_by_split(files: Iterable[str]) -> dict[str | None, list[str]]:
    """Give the files of each split; None: those that do not say what they are of."""
    found: dict[str | None, list[str]] = {}
    for file in files:
        found.setdefault(split_of(file), []).append(file)
    return found


def describe_splits(found: dict[str | None, list[str]]) -> str:
    """Name the splits that were found, with examples, for an error."""
    return "; ".join(
        f"{name or 'no split'}: {len(names)} ({', '.join(names[:_SHOWN_NAMES])}"
        f"{' ...' if len(names) > _SHOWN_NAMES else ''})"
        for name, names in sorted(found.items(), key=lambda item: str(item[0]))
    )


def find_sources_beside(uri: str) -> list[str]:
    """Find what is called like a training set, but held out: `x-val-*.tar` beside `x-train-*.tar`.

    Args:
        uri: a folder, an archive, a list, or a pattern of several files.

    Returns:
        The sources, as patterns where there are several files of one; none if the name does not say
        that it is of training images.
    """
    uri = uri.rstrip("/")
    storage, name = locate_file(uri)
    if split_of(name) != "train":
        return []
    start = uri[: len(uri) - len(name)]
    shape = _Shape.of(name)
    found: dict[_Shape, dict[str, list[str]]] = {}
    for other in storage.list():
        if split_of(other) not in ("val", "test") or is_dropping(other):
            continue
        other_shape = _Shape.of(other)
        if (other_shape.stem, other_shape.is_list) == (shape.stem, shape.is_list):
            files = found.setdefault(other_shape, {})
            files.setdefault(_COUNT.sub("*", other), []).append(other)
    # A set and its archive may lie side by side: one of the same kind goes first.
    chosen = {shape: found[shape]} if shape in found else found
    return sorted(
        start + (pattern if len(names) > 1 else names[0])
        for files in chosen.values()
        for pattern, names in files.items()
    )


class _Shape(NamedTuple):
    """What names of the same data of several splits have in common."""

    stem: str
    ending: str
    is_list: bool

    @staticmethod
    def of(name: str) -> _Shape:
        ending = next((end for end in _ENDINGS if name.lower().endswith(end)), "")
        stem = name[: len(name) - len(ending)]
        stem = _COUNT.sub("#", _SPLIT.sub("#", stem, count=1)).lower()
        return _Shape(stem, ending, ending in LIST_SUFFIXES)


def find_split_folder(
    uri: str, split: str, *, has_classes: bool = True
) -> tuple[str | None, list[str]]:
    """Find the folder of a split below a folder that has some of several.

    Args:
        uri: the folder.
        split: the split that is asked for.
        has_classes: whether the images have classes, and so lie in folders of these.

    Returns:
        Its name, None if the folder has none, or if what is called so are classes; and the usual
        names of the splits beside it.

    Raises:
        ConfigError: there is none of this split but others, or several, or they hold images and no
            classes.
    """
    storage = Storage(uri)
    names = [name for name in storage.list() if not is_dropping(name)]
    folders = [name for name in names if is_split(name) and not storage.exists(name)]
    if not folders:
        return None, []
    splits: dict[str, list[str]] = {}
    for folder in folders:
        splits.setdefault(name_split(folder), []).append(folder)
    are_all = all(is_split(name) or "." in name or storage.exists(name) for name in names)
    chosen = splits.get(name_split(split), [])
    if not are_all and (len(splits) == 1 or not chosen):
        return None, []
    shown = ", ".join(folders)
    if chosen and has_classes and _holds_images(storage.child(chosen[0])):
        if len(splits) == 1:
            return None, []
        raise ConfigError(
            f"{uri}: holds folders that are called as splits are ({shown}), but hold images and no "
            "classes; name the list of their classes as the source, or one of the folders with "
            "class_key=none; if they are classes, say so with format=folder"
        )
    if len(chosen) != 1:
        raise ConfigError(
            f"{uri}: holds folders of the splits {shown}, asked for is {split!r}; name one of them "
            "as the source"
        )
    return chosen[0], sorted(splits.keys() - {name_split(split)})


def _holds_images(folder: Storage) -> bool:
    return any(map(is_image_name, itertools.islice(folder.list(), _EXAMINED_NAMES)))
