"""The `fqgan-data` command.

    fqgan-data shard SRC DST name=NAME split=SPLIT [key=value ...] [--dry-run] [--json]
    fqgan-data verify SRC [deep=true] [key=value ...] [--json]
    fqgan-data stats SRC [--json]

SRC of `shard` is an image folder (class/name.ext), a tar (.gz, .bz2, .xz) of one, or
builtin:photographs; datasets are folders or s3://bucket/prefix.
Exit codes: 0 done, 1 failed, 2 wrong usage or option, 3 verification found damage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from data_tools.progress import ProgressDisplay
from data_tools.rendering import render_shard, render_stats, render_verify
from data_tools.shard import ShardOptions, shard
from data_tools.stats import StatsOptions, compute_stats
from data_tools.verify import VerifyOptions, verify
from fqgan_dist.config import parse_config
from fqgan_dist.errors import ConfigError, FqganError
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.world import World

DONE, FAILED, WRONG_USAGE, DAMAGE_FOUND = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        options = _build_parser().parse_args(arguments)
    except SystemExit as leaving:  # argparse has written its message, or the help
        return int(leaving.code or 0)
    configure_logging(World(), None)
    try:
        return int(options.command_fn(options))
    except ConfigError as error:
        sys.stderr.write(f"ConfigError: {error}\n")
        return WRONG_USAGE
    except FqganError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        return FAILED


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fqgan-data", description="Make and check datasets.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    making = _add_command(commands, "shard", _shard, "make a dataset of WebDataset shards")
    making.add_argument("source", metavar="SRC", help="image folder, tar, or builtin:photographs")
    making.add_argument("destination", metavar="DST", help="new folder or s3://bucket/prefix")
    making.add_argument("--dry-run", action="store_true", help="say what would be made")
    for name, command_fn, help_text in (
        ("verify", _verify, "find damaged files; deep=true decodes every image; exit 3 on damage"),
        ("stats", _stats, "show what is in a dataset"),
    ):
        checking = _add_command(commands, name, command_fn, help_text)
        checking.add_argument("source", metavar="SRC", help="folder or s3:// URI of a dataset")
    for command in commands.choices.values():
        command.add_argument("options", metavar="key=value", nargs="*", help="settings to change")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_command(
    commands: Any, name: str, command_fn: Any, help_text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    command.set_defaults(command_fn=command_fn)
    return command


def _shard(arguments: argparse.Namespace) -> int:
    options = parse_config(_parse_options(arguments), ShardOptions, source="fqgan-data shard")
    with ProgressDisplay() as progress:
        summary = shard(
            arguments.source,
            arguments.destination,
            options,
            is_dry_run=arguments.dry_run,
            progress=progress,
        )
    _write(summary.to_json() if arguments.json else render_shard(summary))
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    options = parse_config(_parse_options(arguments), VerifyOptions, source="fqgan-data verify")
    with ProgressDisplay() as progress:
        report = verify(arguments.source, options, progress=progress)
    _write(report.to_json() if arguments.json else render_verify(report))
    return DAMAGE_FOUND if report.damages else DONE


def _stats(arguments: argparse.Namespace) -> int:
    parse_config(_parse_options(arguments), StatsOptions, source="fqgan-data stats")
    with ProgressDisplay() as progress:
        stats = compute_stats(arguments.source, progress=progress)
    _write(stats.to_json() if arguments.json else render_stats(stats))
    return DONE


def _parse_options(arguments: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for text in arguments.options:
        key, separator, value = text.partition("=")
        if not separator or not key:
            problems.append(f"{text!r}: expected key=value")
        elif key in values:
            problems.append(f"{key}: given twice; give it once")
        else:
            values[key] = _parse_value(key, value, problems)
    if problems:
        raise ConfigError("options:\n  " + "\n  ".join(problems))
    return values


def _parse_value(key: str, text: str, problems: list[str]) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(f"{key}: {text!r} is not a YAML value; put it into quotes")
        return None


def _write(result: dict[str, Any] | str) -> None:
    text = result if isinstance(result, str) else json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
