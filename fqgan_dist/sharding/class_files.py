"""Files that users write of classes: their order, and which labels stand for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fqgan_dist.credentials import holds_credentials
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.labels import order_classes
from fqgan_dist.sharding.listing import SourceListing, class_of, find_fault_of_class
from fqgan_dist.storage.storage import locate_file

_MAX_FILE_BYTES = 2**26
_SHOWN_NAMES = 5
_WORDNET_LINE = re.compile(r"(n\d{8})[\s,]+(\S.*)")


def read_classes(uri: str) -> tuple[list[str], dict[str, str]]:
    r"""Read class names in the order of their labels, and their readable names.

    A line is `n01443537<TAB>goldfish`, or only the class; behind a WordNet id a space will do
    (ImageNet's `LOC_synset_mapping.txt`).

    Raises:
        ConfigError: the file is missing, not text, empty, or names a class twice.
    """
    lines = _read_lines(uri, "classes")
    has_ids = _are_wordnet_lines(lines)
    rows = [_split_line(line, has_ids=has_ids) for line in lines]
    classes = [name for name, _ in rows]
    if not classes or len(set(classes)) != len(classes):
        raise ConfigError(f"classes: {uri}: expected at least one class and none of them twice")
    return classes, {name: text for name, text in rows if text}


def read_class_map(uri: str) -> dict[str, str]:
    """Read which class each label stands for.

    A line is a label and its class, parted by a tab, a comma or a space. Where the lines do not
    begin with numbers and have no tab, they are the classes of the labels 0, 1, ...; what
    `read_classes` takes for readable names is left out.

    Raises:
        ConfigError: the file is missing, not text or empty, gives a label twice, or a class to two
            labels.
    """
    lines = _read_lines(uri, "class_map")
    pairs = [re.fullmatch(r"([0-9]+)[\s,]+(\S.*)", line) for line in lines]
    rows: list[tuple[str, str]]
    if lines and all(pairs):
        rows = [(pair[1].lstrip("0") or "0", pair[2].strip()) for pair in pairs if pair]
    elif _are_wordnet_lines(lines) or not any("\t" in line for line in lines):
        classes, _ = read_classes(uri)
        rows = [(str(label), name) for label, name in enumerate(classes)]
    else:
        rows = [_split_line(line, has_ids=False) for line in lines]
    for what, values in (("label", [row[0] for row in rows]), ("class", [row[1] for row in rows])):
        if twice := sorted(value for value, count in Counter(values).items() if count > 1):
            shown = twice[:_SHOWN_NAMES]
            raise ConfigError(f"class_map: {uri}: {shown!r}: expected every {what} once")
    for _, name in rows:
        if fault := find_fault_of_class(name):
            raise ConfigError(f"class_map: {uri}: {fault}; expected a label and its class per line")
    return dict(rows)


def rename_classes(listing: SourceListing, class_map: Mapping[str, str], uri: str) -> SourceListing:
    """Give the images of a listing the classes that their labels stand for.

    Args:
        listing: the images, whose classes are labels.
        class_map: class by label, no class twice.
        uri: where the map was read, for errors.

    Raises:
        DataError: the map lacks a label. None is passed over: where the map counts from 0 and the
            labels from 1, all other images would get wrong classes.
    """
    labels, known = {class_of(name) for name in listing.names}, list(class_map)
    if unknown := [name for name in order_classes(labels) if name in labels - class_map.keys()]:
        raise DataError(
            f"{listing.uri}: {len(unknown)} labels are not among the {len(class_map)} of class_map "
            f"{uri}, which has {known[0]!r} to {known[-1]!r}: {unknown[:_SHOWN_NAMES]!r}; correct "
            "the map"
        )
    names = [f"{class_map[class_of(name)]}/{name.partition('/')[2]}" for name in listing.names]
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    # A member that is a file itself is found by its name, which is another one now.
    files, numbers = list(listing.files), listing.file_numbers.copy()
    own = np.flatnonzero(numbers < 0)
    numbers[own] = np.arange(len(files), len(files) + len(own), dtype=np.int32)
    files += [listing.names[row] for row in own.tolist()]
    described = listing.class_descriptions
    renamed = replace(
        listing,
        names=names,
        files=files,
        file_numbers=numbers,
        classes=None,
        class_descriptions={class_map[name]: described[name] for name in labels & set(described)},
    )
    return renamed.select(order)


def _read_lines(uri: str, option: str) -> list[str]:
    """Read the lines of a small text file that are not empty.

    Raises:
        ConfigError: it is missing, no text, or holds credentials.
    """
    storage, name = locate_file(uri)
    try:
        if storage.size(name) > _MAX_FILE_BYTES:
            raise ConfigError(f"{option}: {uri} has more than {_MAX_FILE_BYTES} bytes")
        lines = storage.read_bytes(name).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"{option}: {uri}: no such file; correct the path") from error
    except (OSError, DataError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {uri} cannot be read ({error}); name a text file") from error
    if any(map(holds_credentials, lines)):
        raise ConfigError(
            f"{option}: {uri}: a name holds credentials, which datasets would spread; remove them"
        )
    return [line.strip() for line in lines if line.strip()]


def _are_wordnet_lines(lines: Sequence[str]) -> bool:
    return bool(lines) and all(_WORDNET_LINE.fullmatch(line) for line in lines)


def _split_line(line: str, *, has_ids: bool) -> tuple[str, str]:
    if has_ids and (found := _WORDNET_LINE.fullmatch(line)):
        return found[1], found[2]
    name, _, text = line.partition("\t")
    return name.strip(), text.strip()
