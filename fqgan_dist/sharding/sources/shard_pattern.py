"""Patterns that stand for many files, such as `shard-{000000..000146}.tar` or `train-*.parquet`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.droppings import is_dropping

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


def is_pattern(uri: str) -> bool:
    """Whether the last part of a URI stands for several files."""
    name = uri.rpartition("/")[2]
    return _RANGE.search(name) is not None or _is_glob(name)


def match_pattern(pattern: str, present: Collection[str]) -> tuple[list[str], list[str]]:
    """Find the files that a pattern stands for.

    Args:
        pattern: a name with ranges, `*`, `?` or `[...]`; a file of that very name comes first.
        present: the files that are there.

    Returns:
        The files, sorted, and what is missing: names of ranges, and globs that nothing matches.
    """
    found: set[str] = set()
    missing: list[str] = []
    for name in [pattern] if pattern in present else expand_pattern(pattern):
        matching = {name} & set(present) if not _is_glob(name) else fnmatch.filter(present, name)
        found.update(file for file in matching if not is_dropping(file))
        missing += [] if matching else [name]
    return sorted(found), missing


def _is_glob(name: str) -> bool:
    return any(character in name for character in "*?[")


def expand_pattern(pattern: str) -> list[str]:
    """Give the names that a pattern with `{000..146}` stands for, as many digits each.

    Raises:
        ConfigError: a range is backwards, or the pattern stands for too many names.
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise ConfigError(
            f"source {pattern!r}: {found[0]} stands for {last - first + 1} shards; expected "
            f"1 to {_MAX_SHARDS}"
        )
    head, tail = pattern[: found.start()], expand_pattern(pattern[found.end() :])
    width = len(found[1])
    names = [f"{head}{number:0{width}d}" for number in range(first, last + 1)]
    if len(names) * len(tail) > _MAX_SHARDS:
        raise ConfigError(f"source {pattern!r}: stands for more than {_MAX_SHARDS} shards")
    return [name + rest for name in names for rest in tail]
