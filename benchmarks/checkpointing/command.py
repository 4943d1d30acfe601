"""Command line of `benchmarks/checkpoint.py`."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks.checkpointing import restoring, saving, training
from benchmarks.checkpointing.contenders import (
    Contender,
    State,
    build_contenders,
    check,
    count_bytes,
    make_state,
    quiet_dcp,
)
from benchmarks.checkpointing.settings import Settings, SubjectName
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

DISK, MEMORY = "disk", "memory"
Measure = Callable[[str, Mapping[str, Contender], float, Settings], list[Finding]]
_SOURCE = "benchmarks/checkpoint.py"
_LISTS = ("subject",)
# Checkpoints that lie in the folder at most: one of each of the five contenders that write, and the
# former ones of the three that write beside it.
_FOLDER_COPIES = 8
# The state, three copies of it, and one that is read back.
_PROCESS_COPIES = 5


def main(arguments: Sequence[str]) -> int:
    """Measure, print the findings and keep them if asked to; return the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if {"-h", "--help"} & set(arguments):
        print(describe_options(Settings, source=_SOURCE, lists=_LISTS))
        return ALL_MET
    try:
        options = [text for text in arguments if text != "--json"]
        settings = parse_options(options, Settings, source=_SOURCE, lists=_LISTS)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return WRONG_USAGE
    findings = measure(settings)
    command = shlex.join(["python", _SOURCE, *arguments])
    machine = describe_machine(("torch",))
    table, report = to_table(findings, machine, command), to_json(findings, machine, command)
    print(report if "--json" in arguments else table)
    if settings.results is not None:
        is_whole = len(settings.subject) == len(Settings().subject)
        name = "checkpoint" if is_whole else "_".join(["checkpoint", *settings.subject])
        write_results(settings.results, name, table=table, report=report)
    return find_exit_code(findings)


def measure(settings: Settings) -> list[Finding]:
    """Measure all subjects on disk and in memory; nothing is timed of what saves wrongly."""
    torch.set_num_threads(settings.threads)
    state = make_state(round(settings.params_m * 1e6))
    if settings.folder is not None:
        settings.folder.mkdir(parents=True, exist_ok=True)
    findings: list[Finding] = []
    with quiet_dcp():
        for place, folder in ((DISK, settings.folder), (MEMORY, settings.memory_folder)):
            if problem := find_lack_of_room(place, folder, count_bytes(state)):
                findings.append(Finding(subject=place, what="all", verdict="not run", note=problem))
                continue
            with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=folder) as name:
                try:
                    findings += _measure_place(place, state, Path(name), settings)
                except WrongResultError as error:
                    findings.append(
                        Finding(subject=place, what="result", verdict="wrong", note=str(error))
                    )
    return findings


def find_lack_of_room(place: str, folder: Path | None, num_bytes: int) -> str:
    """Say what is missing for a state of so many bytes; empty if nothing is."""
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    if not folder.is_dir():
        return f"{folder}: no such folder"
    needed, free = _FOLDER_COPIES * num_bytes, shutil.disk_usage(folder).free
    if free < needed:
        return f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} needed"
    needed = (_PROCESS_COPIES + (_FOLDER_COPIES if place == MEMORY else 0)) * num_bytes
    free = psutil.virtual_memory().available
    if free < needed:
        return f"{free / 1e9:.1f} GB of memory available, {needed / 1e9:.1f} needed"
    return ""


def _measure_place(place: str, state: State, folder: Path, settings: Settings) -> list[Finding]:
    subjects: dict[SubjectName, Measure] = {
        "saves": saving.measure,
        "training": training.measure,
        "restore": partial(restoring.measure, has_cold=place == DISK),
    }
    contenders = build_contenders(state, folder)
    try:
        for name, contender in contenders.items():
            check(name, contender, state)
        gigabytes = count_bytes(state) / 1e9
        return [
            finding
            for name in settings.subject
            for finding in subjects[name](place, contenders, gigabytes, settings)
        ]
    finally:
        for contender in contenders.values():
            contender.close()
