"""What a command of `fqgan-data` is, and how its arguments are read.

Options are `key=value`, everything else that is no flag is a path or URI; a path that looks like an
option is written `./key=value`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic.fields import FieldInfo

from fqgan_dist.config import Config, parse_config
from fqgan_dist.data.config import parse_source
from fqgan_dist.errors import ConfigError
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.terminal import clean_text
from fqgan_dist.yaml_text import parse_yaml

_OPTION = re.compile(r"([A-Za-z_][A-Za-z0-9_.]*)=(.*)", re.DOTALL)
_HELP_WIDTH = 96


class Result(Protocol):
    """What a command gives: plain values for `--json`; the text for people is rendered apart."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        ...


@dataclass(frozen=True)
class Call:
    """A command line that was understood."""

    paths: Sequence[str]
    """Sources and destination, in the order of the command line."""
    options: Any
    """The command's options: an instance of its `options_type`."""
    is_dry_run: bool
    """Whether to say what would be done, and do nothing."""
    observer: Observer
    """Is told how far the work is."""


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    name: str
    """What the user types."""
    summary: str
    """What it does, in one line."""
    paths: Sequence[str]
    """Names of its sources and destination; one that ends in `...` stands for one or more."""
    options_type: type[Config]
    """Its `key=value` options."""
    run: Callable[[Call], Result]
    """Does it."""
    render: Callable[[Any], str]
    """Writes the result for people."""
    has_dry_run: bool = False
    """Whether there is `--dry-run`."""
    find_exit_code: Callable[[Any], int] = lambda _: 0
    """Gives the exit code of a result."""

    def add_to(self, commands: Any) -> None:
        """Add the command to argparse's subcommands."""
        parser: argparse.ArgumentParser = commands.add_parser(
            self.name,
            help=self.summary,
            description=self.summary,
            usage=self._usage(),
            epilog=describe_options(self.options_type),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(command=self)
        parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
        if self.has_dry_run:
            parser.add_argument(
                "--dry-run", action="store_true", help="say what would be done, and do nothing"
            )

    def parse(self, arguments: Sequence[str], *, is_dry_run: bool, observer: Observer) -> Call:
        """Tell paths from options, and check both.

        Raises:
            ConfigError: too few, too many or wrong paths, or every problem of the options.
        """
        matches = [_OPTION.fullmatch(text) for text in arguments]
        paths = [text for text, match in zip(arguments, matches, strict=True) if match is None]
        values = _parse_values([match.groups() for match in matches if match is not None])
        self._check_paths(paths)
        places = [self._parse_path(text) for text in paths]
        options = parse_config(values, self.options_type, source=f"fqgan-data {self.name}")
        return Call(places, options, is_dry_run, observer)

    def _parse_path(self, text: str) -> str:
        try:
            return parse_source(text)
        except ValueError as error:
            raise ConfigError(f"fqgan-data {self.name}: {error}") from error

    def _check_paths(self, paths: Sequence[str]) -> None:
        is_open = any(name.endswith("...") for name in self.paths)
        if len(paths) < len(self.paths):
            missing = " ".join(self.paths[len(paths) :])
            raise ConfigError(f"fqgan-data {self.name}: {missing} is missing; {self._usage()}")
        if len(paths) > len(self.paths) and not is_open:
            raise ConfigError(
                f"fqgan-data {self.name}: {paths[len(self.paths)]!r}: expected key=value; "
                f"{self._usage()}"
            )

    def _usage(self) -> str:
        flags = "[--dry-run] [--json]" if self.has_dry_run else "[--json]"
        return f"fqgan-data {self.name} {' '.join(self.paths)} [key=value ...] {flags}"


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that knows the nearest name of a mistyped command."""

    def error(self, message: str) -> typing.NoReturn:
        """Leave with exit code 2, as argparse does."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong is not None:
            known = re.findall(r"[\w-]+", wrong[2])
            near = difflib.get_close_matches(wrong[1], known, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        super().error(str(clean_text(message)))


def describe_options(options_type: type[Config]) -> str:
    """List every option with its default and meaning."""
    fields = options_type.model_fields
    if not fields:
        return "no options"
    lines = ["options:"]
    for name, field in fields.items():
        lines.append(f"  {name}={_type_name(field.annotation)}{_default(field)}")
        text = " ".join((field.description or "").split())
        lines += textwrap.wrap(
            text, _HELP_WIDTH, initial_indent="      ", subsequent_indent=" " * 6
        )
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "  (required)"
    default = field.get_default(call_default_factory=True)
    if default is None or default == "":
        return "  (default none)"
    return f"  (default {str(default).lower() if isinstance(default, bool) else default})"


def _type_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(map(str, inner))
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(item) for item in inner if item is not type(None))
    return str(getattr(origin or annotation, "__name__", annotation)).upper()


def _parse_values(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, text in pairs:
        if key in values:
            problems.append(f"{key}: given twice; give it once")
        else:
            values[key] = _parse_value(key, text, problems)
    if problems:
        raise ConfigError("options:\n  " + "\n  ".join(problems))
    return values


def _parse_value(key: str, text: str, problems: list[str]) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        problems.append(f"{key}: {text!r} is not a YAML value; put it into quotes")
        return None
