"""Patterns that stand for many shards, such as `shard-{000000..000146}.tar`."""

from __future__ import annotations

import re

from fqgan_dist.errors import ConfigError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


def is_pattern(uri: str) -> bool:
    """Whether a URI stands for several shards."""
    return _RANGE.search(uri) is not None


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
