"""Classes as they stand in columns and fields."""

from __future__ import annotations

from typing import Any

from fqgan_dist.sharding.listing import is_no_label

_SHOWN_CHARACTERS = 40


def class_from_value(value: Any) -> str | None:
    """Give the class that a value of a column names; None if it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    name = str(value).strip()
    return None if not name or is_no_label(name) else name


def describe_missing_class(value: Any) -> str:
    """Say that a value names no class."""
    return f"{str(value)[:_SHOWN_CHARACTERS]!a} is no class: a number or a name"
