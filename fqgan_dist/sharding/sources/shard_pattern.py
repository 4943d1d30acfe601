"""Patterns of many files: `shard-{000000..000146}.tar`, `train-*.parquet`, `{a,b}.zip`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.droppings import is_dropping

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_MAX_SHARDS = 1_000_000


def is_pattern(uri: str) -> bool:
    """Whether the last part of a URI stands for several files."""
    name = uri.rpartition("/")[2]
    return _BRACES.search(name) is not None or is_glob(name)


def match_pattern(pattern: str, present: Collection[str]) -> tuple[list[str], list[str]]:
    """Find the files that a pattern stands for.

    Args:
        pattern: a name with `{0..9}`, `{a,b}`, `*`, `?` or `[...]`; a file of that very name comes
            first.
        present: the files that are there.

    Returns:
        The files, sorted, and what is missing: names of ranges, and globs that nothing matches.
    """
    if pattern in present:
        return [pattern], []
    found: set[str] = set()
    missing: list[str] = []
    for name in expand_pattern(pattern):
        matching = {name} & set(present) if not is_glob(name) else fnmatch.filter(present, name)
        found.update(file for file in matching if not is_dropping(file))
        missing += [] if matching else [name]
    return sorted(found), missing


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a name; `*` stands for slashes too."""
    return any(fnmatch.fnmatchcase(name, each) for each in expand_pattern(pattern))


def is_glob(name: str) -> bool:
    """Whether a name stands for what happens to be there, not for certain names."""
    return any(character in name for character in "*?[")


def expand_pattern(pattern: str) -> list[str]:
    """Give the names that braces stand for: `{000..146}`, of as many digits each, or `{a,b}`.

    Raises:
        ConfigError: a range is backwards, or the pattern stands for too many names.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], expand_pattern(pattern[found.end() :])
    if found[3] is None:
        values = _expand_range(pattern, found)
    else:
        values = [value.strip() for value in found[3].split(",")]
    names = [head + value for value in values]
    if len(names) * len(tail) > _MAX_SHARDS:
        raise ConfigError(f"source {pattern!r}: stands for more than {_MAX_SHARDS} shards")
    return [name + rest for name in names for rest in tail]


def _expand_range(pattern: str, found: re.Match[str]) -> list[str]:
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < _MAX_SHARDS:
        raise ConfigError(
            f"source {pattern!r}: {found[0]} stands for {last - first + 1} shards; expected "
            f"1 to {_MAX_SHARDS}"
        )
    width = len(found[1])
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
