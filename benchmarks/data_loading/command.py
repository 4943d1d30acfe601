"""Command line of `benchmarks/data.py`."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.data_loading import bandwidth, codes, decode, loaders, scale
from benchmarks.data_loading.peers import PEER_PACKAGES
from benchmarks.data_loading.settings import Settings, SubjectName
from benchmarks.options import describe_options, parse_options
from benchmarks.paired import Finding, WrongResultError
from benchmarks.reporting import (
    ALL_MET,
    WRONG_USAGE,
    describe_machine,
    find_exit_code,
    to_json,
    to_table,
    write_results,
)
from fqgan_dist.errors import ConfigError

SUBJECTS: dict[SubjectName, Callable[[Settings, Path], list[Finding]]] = {
    "decode": decode.measure,
    "loaders": loaders.measure,
    "bandwidth": bandwidth.measure,
    "codes": codes.measure,
    "scale": scale.measure,
}
_PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "pyarrow", "s3fs", *PEER_PACKAGES)
_SOURCE = "benchmarks/data.py"
_LISTS = ("subject", "qualities", "workers")


def main(arguments: Sequence[str]) -> int:
    """Measure, print the findings and keep them if asked to; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if {"-h", "--help"} & set(arguments):
        print(describe_options(Settings, source=_SOURCE, lists=_LISTS))
        return ALL_MET
    try:
        settings = parse_settings([text for text in arguments if text != "--json"])
        findings = measure(settings)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return WRONG_USAGE
    command = shlex.join(["python", _SOURCE, *arguments])
    machine = describe_machine(_PACKAGES)
    table, report = to_table(findings, machine, command), to_json(findings, machine, command)
    print(report if "--json" in arguments else table)
    if settings.results is not None:
        is_whole = len(settings.subject) == len(SUBJECTS)
        name = "data" if is_whole else "_".join(["data", *settings.subject])
        write_results(settings.results, name, table=table, report=report)
    return find_exit_code(findings)


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Read `key=value` options; lists are written with commas.

    Raises:
        ConfigError: an argument is no option, or every problem of the options.
    """
    return parse_options(arguments, Settings, source=_SOURCE, lists=_LISTS)


def measure(settings: Settings) -> list[Finding]:
    """Measure all subjects; a wrong result is a finding, and nothing of it is timed."""
    torch.set_num_threads(1)
    findings: list[Finding] = []
    if settings.work is not None:
        settings.work.mkdir(parents=True, exist_ok=True)
    for name in settings.subject:
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=settings.work) as folder:
            try:
                findings += SUBJECTS[name](settings, Path(folder))
            except WrongResultError as error:
                findings.append(
                    Finding(subject=name, what="result", verdict="wrong", note=str(error))
                )
    return findings
