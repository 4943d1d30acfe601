"""Options of the benchmarks that are run by hand, as `key=value`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from fqgan_dist.config import Config, parse_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.yaml_text import parse_yaml

ConfigT = TypeVar("ConfigT", bound=Config)


def parse_options(
    arguments: Sequence[str], kind: type[ConfigT], *, source: str, lists: Collection[str] = ()
) -> ConfigT:
    """Read options into settings; those named as lists are written with commas.

    Raises:
        ConfigError: an argument is no option, or every problem of the options.
    """
    values: dict[str, Any] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: expected key=value, or --json")
        values[key] = value.split(",") if key in lists else parse_yaml(value)
    return parse_config(values, kind, source=source)


def describe_options(kind: type[Config], *, source: str, lists: Collection[str] = ()) -> str:
    """Write the options with their defaults, for `--help`; arguments as of `parse_options`."""
    lines = [f"python {source} [key=value ...] [--json]", ""]
    for name, field in kind.model_fields.items():
        default = ",".join(map(str, field.default)) if name in lists else field.default
        lines.append(f"  {name}={default}\n      {' '.join((field.description or '').split())}")
    return "\n".join(lines)
