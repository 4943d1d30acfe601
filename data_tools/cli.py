"""The `fqgan-data` command.

    fqgan-data shard SRC DST name=NAME split=SPLIT [key=value ...] [--dry-run] [--json]
    fqgan-data extend SRC DST [key=value ...] [--dry-run] [--json]
    fqgan-data reshard SRC DST [key=value ...] [--dry-run] [--json]
    fqgan-data split SRC DST parts='{train: 0.9, val: 0.1}' [key=value ...] [--dry-run] [--json]
    fqgan-data merge SRC SRC... DST name=NAME [key=value ...] [--dry-run] [--json]
    fqgan-data index SRC name=NAME split=SPLIT [key=value ...] [--json]
    fqgan-data verify SRC [deep=true] [key=value ...] [--json]
    fqgan-data stats SRC [--json]

`fqgan-data COMMAND --help` lists the options of a command. Datasets are folders or s3://bucket/prefix.
Exit codes: 0 done, 1 failed, 2 wrong usage or option, 3 verification found damage, 75 the storage
did not answer or a disk was full: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_tools.command import Call, Command, CommandParser
from data_tools.extend import ExtendOptions, ExtendSummary, extend
from data_tools.index import IndexOptions, IndexSummary, index
from data_tools.rearrange import (
    MergeOptions,
    ReshardOptions,
    SplitOptions,
    SplitSummary,
    merge,
    reshard,
    split,
)
from data_tools.rendering import (
    render_extend,
    render_index,
    render_shard,
    render_split,
    render_stats,
    render_verify,
)
from data_tools.shard import ShardOptions, ShardSummary, shard
from data_tools.stats import DatasetStats, StatsOptions, compute_stats
from data_tools.verify import VerifyOptions, verify
from fqgan_dist.command_line import DAMAGE_FOUND, DONE, carry_out
from fqgan_dist.sharding.verification import VerifyReport
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver
from fqgan_dist.terminal import write, write_json
from fqgan_dist.world import World


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    # argparse takes no path or option after a flag.
    given.sort(key=lambda text: text.startswith("-"))
    try:
        parsed = _build_parser().parse_args(given)
    except SystemExit as leaving:  # argparse has written its message, or the help
        return int(leaving.code or 0)
    configure_logging(World(), None)
    return carry_out(lambda: _run(parsed.command, parsed))


def _run(command: Command, parsed: argparse.Namespace) -> int:
    is_dry_run = command.has_dry_run and parsed.dry_run
    call = command.parse(parsed.arguments, is_dry_run=is_dry_run, observer=LocalObserver())
    result = command.run(call)
    write_json(result.to_json()) if parsed.json else write(command.render(result))
    return command.find_exit_code(result)


def _shard(call: Call) -> ShardSummary:
    source, destination = call.paths
    return shard(
        source, destination, call.options, is_dry_run=call.is_dry_run, observer=call.observer
    )


def _extend(call: Call) -> ExtendSummary:
    source, destination = call.paths
    return extend(
        source, destination, call.options, is_dry_run=call.is_dry_run, observer=call.observer
    )


def _reshard(call: Call) -> ShardSummary:
    source, destination = call.paths
    return reshard(
        source, destination, call.options, is_dry_run=call.is_dry_run, observer=call.observer
    )


def _split(call: Call) -> SplitSummary:
    source, destination = call.paths
    return split(
        source, destination, call.options, is_dry_run=call.is_dry_run, observer=call.observer
    )


def _merge(call: Call) -> ShardSummary:
    *sources, destination = call.paths
    return merge(
        sources, destination, call.options, is_dry_run=call.is_dry_run, observer=call.observer
    )


def _index(call: Call) -> IndexSummary:
    return index(call.paths[0], call.options, observer=call.observer)


def _verify(call: Call) -> VerifyReport:
    return verify(call.paths[0], call.options, observer=call.observer)


def _stats(call: Call) -> DatasetStats:
    return compute_stats(call.paths[0], observer=call.observer)


COMMANDS = (
    Command(
        "shard",
        "make a dataset of WebDataset shards",
        ("SRC", "DST"),
        ShardOptions,
        _shard,
        render_shard,
        has_dry_run=True,
    ),
    Command(
        "extend",
        "add images to a dataset in new shards; the old ones stay as they are",
        ("SRC", "DST"),
        ExtendOptions,
        _extend,
        render_extend,
        has_dry_run=True,
    ),
    Command(
        "reshard",
        "make a dataset of another one's samples, in other shards or of smaller images",
        ("SRC", "DST"),
        ReshardOptions,
        _reshard,
        render_shard,
        has_dry_run=True,
    ),
    Command(
        "split",
        "divide a dataset into several, each with its share of every class",
        ("SRC", "DST"),
        SplitOptions,
        _split,
        render_split,
        has_dry_run=True,
    ),
    Command(
        "merge",
        "make one dataset of several; classes are united by name",
        ("SRC", "SRC...", "DST"),
        MergeOptions,
        _merge,
        render_shard,
        has_dry_run=True,
    ),
    Command(
        "index",
        "make an index for WebDataset shards of any maker, beside them",
        ("SRC",),
        IndexOptions,
        _index,
        render_index,
    ),
    Command(
        "verify",
        "find damaged files; deep=true decodes every image; exit code 3 on damage",
        ("SRC",),
        VerifyOptions,
        _verify,
        render_verify,
        find_exit_code=lambda report: DAMAGE_FOUND if report.damages else DONE,
    ),
    Command("stats", "show what is in a dataset", ("SRC",), StatsOptions, _stats, render_stats),
)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fqgan-data", description="Make, change and check datasets.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for command in COMMANDS:
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
