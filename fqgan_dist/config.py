"""Strict configuration: frozen pydantic models, YAML files, `key.sub=value` overrides.

A config file is complete, or names one `base:` file and lists only its differences. Every problem is
reported at once, each with its dotted location and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fqgan_dist.errors import ConfigError

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
    """Read a YAML mapping; a `base:` file beside it is read first and the differences are laid over it."""
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
        ConfigError: every problem, one line each.
    """
    try:
        return config_type.model_validate(dict(values))
    except ValidationError as error:
        problems = [_describe(problem, config_type) for problem in error.errors()]
        raise ConfigError(
            f"{source}: {len(problems)} problem(s)\n  " + "\n  ".join(problems)
        ) from None


def dump_config(config: Config) -> str:
    """Write a config as YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Value]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file; name an existing YAML file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


def _merge(base: dict[str, Value], changes: Mapping[str, Value]) -> dict[str, Value]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(values: dict[str, Value], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    *parents, leaf = path.split(".")
    target: Value = values
    for depth, part in enumerate(parents):
        target = _child(target, part, ".".join(parents[: depth + 1]))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {path!r}: {text!r} is not a YAML value: {error}") from error
    if isinstance(target, list):
        target[_list_index(target, leaf, path)] = value
    else:
        target[leaf] = value


def _child(target: Value, part: str, where: str) -> Value:
    if isinstance(target, list):
        return target[_list_index(target, part, where)]
    child = target.get(part)
    if child is None:
        child = target[part] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"override: {where} is {child!r}, a single value, not a group of settings"
        )
    return child


def _list_index(target: list[Value], part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(
            f"override: {where}: expected a list index below {len(target)}, got {part!r}"
        )
    return int(part)


def _describe(problem: Any, config_type: type[Config]) -> str:
    location = [part for part in problem["loc"] if not _is_union_tag(part, problem)]
    dotted = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(config_type, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else f"; known: {', '.join(known)}"
            if known
            else ""
        )
        return f"{dotted}: unknown setting{hint}"
    if problem["type"] == "missing":
        return f"{dotted}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # A validator's own message names value, expectation and remedy already.
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted}: {problem['input']!r}: {message}"


def _is_union_tag(part: int | str, problem: Any) -> bool:
    # pydantic puts the chosen member of a discriminated union into the location; users do not write it.
    return isinstance(part, str) and part.startswith("tag:") and problem["loc"][-1] != part


def _known_keys(config_type: type[Config], location: Sequence[int | str]) -> set[str]:
    candidates: list[type[Config]] = [config_type]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in candidates if part in model.model_fields]
        if fields:
            candidates = [model for field in fields for model in _config_types(field.annotation)]
    return {name for model in candidates for name in model.model_fields}


def _config_types(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _config_types(inner)]
