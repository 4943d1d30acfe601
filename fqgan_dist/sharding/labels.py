"""Classes as they stand in columns, fields and folders, and the order of their labels."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import Any

from fqgan_dist.terminal import printable

_SHOWN_CHARACTERS = 40
_SHOWN_CLASSES = 3
# A label below this is the number of a class, so that every label keeps its number; a greater
# number (an id of some catalogue) is a name like any other.
_MAX_CLASS_NUMBER = 99_999
# How "no label" is written where a class is expected, in small letters: -1 is Hugging Face's, the
# others are what tables hold for a missing value.
_NO_LABELS = frozenset({"-1", "-1.0", "nan", "null", "<na>"})


def is_no_label(name: str) -> bool:
    """Whether what stands in a class's place says that there is none."""
    return name.strip().lower() in _NO_LABELS


def order_classes(names: Set[str]) -> list[str]:
    """Put classes into the order of their labels, the same for every kind of source.

    Where all names are numbers, they are the labels: the classes are 0, 1, ... up to the greatest.
    Else the names are sorted.
    """
    if all(map(_is_class_number, names)):
        return [str(label) for label in range(max(map(int, names), default=0) + 1)]
    return sorted(names)


def describe_classes(classes: Sequence[str]) -> str:
    """Say which label the first and last classes have, before anything is written with them."""
    shown = [f"{label} {printable(name)}" for label, name in enumerate(classes)]
    if len(shown) > 2 * _SHOWN_CLASSES:
        shown[_SHOWN_CLASSES:-_SHOWN_CLASSES] = ["..."]
    return f"labels: {', '.join(shown)}"


def _is_class_number(name: str) -> bool:
    # Of so many digits before Python counts them: it refuses to read thousands.
    is_short = len(name) <= len(str(_MAX_CLASS_NUMBER))
    is_number = is_short and name.isdecimal() and name.isascii() and name == str(int(name))
    return is_number and int(name) <= _MAX_CLASS_NUMBER


def class_from_value(value: Any) -> str | None:
    """Give the class that a value of a column or field names; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    name = str(value).strip()
    if re.fullmatch(r"[0-9]+\.0", name):
        # pandas writes whole numbers so where one of them is missing.
        name = name.removesuffix(".0")
    return None if not name or is_no_label(name) else name


def describe_missing_class(value: Any) -> str:
    """Say that a value names no class."""
    is_missing = value is None or is_no_label(str(value)) or not str(value).strip()
    if is_missing:
        return f"no label: {value!r}"
    return f"{str(value)[:_SHOWN_CHARACTERS]!a} is no class: a number or a name"
