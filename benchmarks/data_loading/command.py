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
from benchmarks.options import parse_options
from benchmarks.paired import Finding, WrongResultError
from benchmarks.reporting import describe_machine, to_json, to_table, write_results
from fqgan_dist.errors import ConfigError

ALL_MET, MISSED, WRONG_USAGE, NOT_JUDGED = 0, 1, 2, 3
SUBJECTS: dict[SubjectName, Callable[[Settings, Path], list[Finding]]] = {
    "decode": decode.measure,
    "loaders": loaders.measure,
    "bandwidth": bandwidth.measure,
    "codes": codes.measure,
    "scale": scale.measure,
}
_PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "pyarrow", "s3fs", *PEER_PACKAGES)
_LISTS = ("subject", "qualities", "workers")


def main(arguments: Sequence[str]) -> int:
    """Measure, print the findings and keep them if asked to; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if {"-h", "--help"} & set(arguments):
        print(_describe_options())
        return ALL_MET
    try:
        settings = parse_settings([text for text in arguments if text != "--json"])
        findings = measure(settings)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return WRONG_USAGE
    command = shlex.join(["python", "benchmarks/data.py", *arguments])
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
    return parse_options(arguments, Settings, source="benchmarks/data.py", lists=_LISTS)


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


def find_exit_code(findings: Sequence[Finding]) -> int:
    """Sum the verdicts up."""
    verdicts = {finding.verdict for finding in findings}
    if verdicts & {"missed", "wrong"}:
        return MISSED
    return NOT_JUDGED if verdicts & {"noisy", "not run"} else ALL_MET


def _describe_options() -> str:
    lines = ["python benchmarks/data.py [key=value ...] [--json]", ""]
    for name, field in Settings.model_fields.items():
        default = ",".join(map(str, field.default)) if name in _LISTS else field.default
        lines.append(f"  {name}={default}\n      {' '.join((field.description or '').split())}")
    return "\n".join(lines)
