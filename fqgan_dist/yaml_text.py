"""YAML of settings, on the command line or in a file, read with bounds of size, depth and aliases.

Nine lines of aliases can stand for a billion values, and a thousand brackets for a thousand calls.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

MAX_TEXT_BYTES = 2**18
"""Longest file or value; a whole configuration has some 10 kB."""

_MAX_DEPTH = 50
_MAX_NODES = 20_000
# Python refuses to write numbers of thousands of digits, as messages do.
_MAX_NUMBER_BITS = 1024
# What PyYAML's constructors raise for values of an explicit tag (`!!bool maybe`, `!!int ''`), for
# dates that are none, and for numbers of thousands of digits.
_CONSTRUCTION_ERRORS = (ValueError, OverflowError, LookupError, AttributeError, TypeError)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain values; every alias gets a copy of its own.

    Raises:
        ValueError: it is no YAML, gives a setting twice, or would be larger or deeper than any
            settings, with its aliases written out.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"{len(text)} characters; expected at most {MAX_TEXT_BYTES}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else _unshare(loader.construct_document(node))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except _CONSTRUCTION_ERRORS as error:
        raise ValueError(f"a value is not of its kind ({error})") from error
    return value


class _Loader(yaml.SafeLoader):
    """Refuses a setting that is given twice, of which YAML silently takes the last, and bombs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = self._num_nodes = 0
        # Values below each node, and levels, with aliases written out; by identity.
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._open += 1
        mark = self.peek_event().start_mark
        # Before what is inside: composing is recursive, and takes half a second for so many values.
        _check(self._open, _MAX_DEPTH, "levels", mark)
        self._num_nodes += 1
        _check(self._num_nodes, _MAX_NODES, "values", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._open -= 1
        if node is None:
            return None
        if not is_alias:
            inner = [self._extents[id(each)] for each in _children(node)]
            size = 1 + sum(size for size, _ in inner)
            self._extents[id(node)] = (size, 1 + max((depth for _, depth in inner), default=0))
        if id(node) not in self._extents:
            raise yaml.MarkedYAMLError(problem="an alias inside of itself", problem_mark=mark)
        size, depth = self._extents[id(node)]
        _check(size, _MAX_NODES, "values", mark)
        _check(depth, _MAX_DEPTH, "levels", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := sorted(key for key, count in keys.items() if count > 1):
            raise yaml.MarkedYAMLError(
                problem=f"{', '.join(twice)} is given twice", problem_mark=node.start_mark
            )
        return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    match node:
        case yaml.MappingNode():
            return [each for pair in node.value for each in pair]
        case yaml.SequenceNode():
            return node.value
        case _:
            return []


def _check(found: int, limit: int, what: str, mark: yaml.Mark) -> None:
    if found > limit:
        raise yaml.MarkedYAMLError(
            problem=f"more than {limit} {what}, aliases written out; settings have far fewer",
            problem_mark=mark,
        )


def _unshare(value: Any) -> Any:
    # So that an override changes one place only.
    if isinstance(value, dict):
        return {_unshare(key): _unshare(item) for key, item in value.items()}
    if isinstance(value, int) and value.bit_length() > _MAX_NUMBER_BITS:
        raise ValueError(f"a whole number of {value.bit_length()} bits; settings have at most 64")
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair, escaped, can be written nowhere
    return [_unshare(item) for item in value] if isinstance(value, list) else value
