"""Strict configuration: frozen pydantic models, YAML files, `key.sub=value` overrides.

A config file is complete, or names one `base:` file and lists only its differences. Every problem
is reported at once, each with its dotted location and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fqgan_dist.credentials import holds_credentials, redact
from fqgan_dist.errors import ConfigError
from fqgan_dist.yaml_text import MAX_TEXT_BYTES, parse_yaml

# Type of a pydantic error that holds several problems, and their place in its context.
_SEVERAL = "problems"

_MAX_INDEX_DIGITS = 9

MAX_COUNT = 2**63 - 1
"""Greatest size, place or number of anything: what files, tables and NumPy have room for. Numbers
that others wrote are held to it, so that no sum of two wraps around or is too long to be shown."""

Value = Any
"""A plain YAML value: scalar, list or mapping."""


class Config(BaseModel):
    """Base of all settings: immutable, unknown keys refused, field docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def find_problems(self) -> Iterable[str]:
        """Find what is wrong between the settings of this group; every problem is reported.

        A group overrides this to be checked. Called when each setting by itself is right.
        """
        return ()

    @model_validator(mode="after")
    def _report_problems(self) -> Self:
        problems = list(self.find_problems())
        if problems:
            raise PydanticCustomError(
                _SEVERAL, "{text}", {"text": "; ".join(problems), _SEVERAL: problems}
            )
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(path: Path | str, overrides: Sequence[str], config_type: type[ConfigT]) -> ConfigT:
    """Read a YAML file, apply `key.sub=value` overrides and validate.

    Raises:
        ConfigError: the file is missing or not YAML, an override has no `=`, or values are wrong.
    """
    values = read_config_file(Path(path))
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, config_type, source=str(path))


def read_config_file(path: Path) -> dict[str, Value]:
    """Read a YAML mapping; the differences to a `base:` file beside it are laid over that.

    Groups are merged, but a group of another `kind` replaces the former whole, as do lists.

    Raises:
        ConfigError: a file is missing or not YAML, or the base names a base itself.
    """
    values = _read_yaml(path)
    base_name = values.pop("base", None)
    if base_name is None:
        return values
    base = _read_yaml(path.parent / str(base_name))
    if "base" in base:
        raise ConfigError(f"{path}: base {base_name!r} names a base itself; one level is allowed")
    return _merge(base, values)


def parse_config(
    values: Mapping[str, Value], config_type: type[ConfigT], *, source: str
) -> ConfigT:
    """Validate plain values.

    Raises:
        ConfigError: every problem, one line each. Credentials come first, and are not repeated: no
            setting holds any, and what is written of settings would spread them.
    """
    secrets = [
        f"{where or 'a setting'}: holds credentials ({redact(text)}); expected none: give it "
        "where the tools of the service look for it"
        for where, text in _find_texts(values)
        if holds_credentials(text)
    ]
    if secrets:
        raise ConfigError(_list_problems(source, secrets))
    try:
        return config_type.model_validate(dict(values))
    except ValidationError as error:
        problems = [
            line
            for problem in error.errors()
            if not _is_of_unused_member(problem)
            for line in _describe(problem, config_type)
        ]
        raise ConfigError(_list_problems(source, problems)) from None


def _list_problems(source: str, problems: Sequence[str]) -> str:
    return f"{source}: {len(problems)} problem(s)\n  " + "\n  ".join(problems)


def _find_texts(value: Value, where: str = "") -> Iterator[tuple[str, str]]:
    """Find all texts of plain values, keys included, each with its dotted place."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield where, str(key)
            yield from _find_texts(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _find_texts(item, f"{where}.{position}")


def describe_unknown(name: str, known: Sequence[str]) -> str:
    """Say what a name that nobody knows may have meant, or else what is known."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def dump_config(config: Config) -> str:
    """Write a config as YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Value]:
    try:
        with path.open(encoding="utf-8") as file:
            values = parse_yaml(file.read(MAX_TEXT_BYTES + 1))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file; name an existing YAML file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


def _merge(base: dict[str, Value], changes: Mapping[str, Value]) -> dict[str, Value]:
    merged = dict(base)
    for key, value in changes.items():
        former = merged.get(key)
        if isinstance(value, Mapping) and isinstance(former, dict) and _same_kind(former, value):
            merged[key] = _merge(former, value)
        else:
            merged[key] = value
    return merged


def _same_kind(former: Mapping[str, Value], change: Mapping[str, Value]) -> bool:
    # A group of another `kind` has other settings altogether.
    return "kind" not in change or change["kind"] == former.get("kind")


def _apply_override(values: dict[str, Value], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    *parents, leaf = path.split(".")
    target: Value = values
    for depth, part in enumerate(parents):
        target = _child(target, part, ".".join(parents[: depth + 1]))
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {path!r}: {text!r} is not a YAML value: {error}") from error
    if isinstance(target, list):
        target[_list_index(target, leaf, path)] = value
    else:
        target[leaf] = value


def _child(target: Value, part: str, where: str) -> Value:
    if isinstance(target, list):
        child = target[_list_index(target, part, where)]
    else:
        child = target.get(part)
        if child is None:
            child = target[part] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"override: {where} is {child!r}, a single value, not a group of settings"
        )
    return child


def _list_index(target: list[Value], part: str, where: str) -> int:
    is_number = part.isascii() and part.isdecimal() and len(part) <= _MAX_INDEX_DIGITS
    if not is_number or int(part) >= len(target):
        raise ConfigError(
            f"override: {where}: expected a list index below {len(target)}, got {part!r}"
        )
    return int(part)


def _describe(problem: Any, config_type: type[Config]) -> list[str]:
    location, known = _locate(config_type, problem["loc"])
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return [f"{dotted}: unknown setting; {describe_unknown(str(location[-1]), known)}"]
    if problem["type"] == "missing":
        return [f"{dotted}: required, but not given"]
    start = f"{dotted}: " if dotted else ""
    # A validator's own message names value, expectation and remedy already.
    if problem["type"] == _SEVERAL:
        return [f"{start}{each}" for each in problem["ctx"][_SEVERAL]]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return [f"{start}{message}"]
    return [f"{dotted}: {problem['input']!r}: {message}"]


def _is_of_unused_member(problem: Any) -> bool:
    # A group given where a name or a group may stand: that it is no name tells the user nothing.
    is_group = isinstance(problem["input"], dict)
    return problem["type"] == "string_type" and problem["loc"][-1] == "str" and is_group


def _locate(
    config_type: type[Config], location: Sequence[int | str]
) -> tuple[list[Any], list[str]]:
    """Turn pydantic's location of a problem into the one that users write.

    It leaves out the names of union members, which pydantic puts after the field; with it come the
    sorted settings of the group that the last part belongs to.
    """
    annotations: list[Any] = [config_type]
    path: list[Any] = []
    known: set[str] = set()
    for part in location:
        if len(annotations) > 1:
            annotations = [each for each in annotations if _is_member(each, str(part))]
            continue
        path.append(part)
        groups = [each for each in annotations if _is_config(each)]
        known = {name for group in groups for name in group.model_fields}
        annotations = [inner for each in annotations for inner in _enter(each, part)]
    return path, sorted(known)


def _enter(annotation: Any, part: int | str) -> list[Any]:
    """Return what a field of a config, or an item of a list, tuple or dict, may be."""
    if _is_config(annotation):
        field = annotation.model_fields.get(part)
        return _union_members(field.annotation) if field else []
    inner = [each for each in typing.get_args(annotation) if each is not ...]
    if not inner:
        return []
    if isinstance(part, int) and part < len(inner):  # a tuple of fixed length, or the first item
        return _union_members(inner[part])
    return _union_members(inner[-1])


def _union_members(annotation: Any) -> list[Any]:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _union_members(inner[0])
    if origin in (typing.Union, types.UnionType):
        # Absence is no member: pydantic writes nothing for it.
        return [
            member for each in inner if each is not type(None) for member in _union_members(each)
        ]
    return [annotation]


def _is_member(annotation: Any, tag: str) -> bool:
    """Whether a union member is the one that pydantic calls by this tag or type name."""
    if not _is_config(annotation):
        return False
    tags = [
        value
        for field in annotation.model_fields.values()
        if typing.get_origin(field.annotation) is typing.Literal
        for value in typing.get_args(field.annotation)
    ]
    # A model with validators is called function-after[check(), Name].
    return annotation.__name__ in re.findall(r"\w+", tag) or tag in tags


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)
