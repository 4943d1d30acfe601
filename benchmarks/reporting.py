"""Tables of findings, what they were measured on, and the files they are kept in."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.paired import Finding

ALL_MET, MISSED, WRONG_USAGE, NOT_JUDGED = 0, 1, 2, 3
"""Exit codes."""

_PROCESSOR_FILE, _PROCESSOR_LINE = "/proc/cpuinfo", r"model name\s*:\s*(.+)"
_HEADER = (
    "what",
    "value",
    "unit",
    "compared with",
    "ratio (minima)",
    "ratio (median) [95 %]",
    "A/A",
    "target",
    "verdict",
)


def describe_machine(packages: Sequence[str]) -> dict[str, str]:
    """Name what the numbers depend on: processor, cores, load, and versions of packages."""
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _read_processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }
    return machine | {name: _version(name) for name in packages}


def to_json(findings: Sequence[Finding], machine: Mapping[str, str], command: str) -> str:
    """Write findings as JSON."""
    report: dict[str, Any] = {"command": command, "machine": dict(machine)}
    return json.dumps(report | {"findings": [asdict(each) for each in findings]}, indent=2)


def to_table(findings: Sequence[Finding], machine: Mapping[str, str], command: str) -> str:
    """Write findings for a reader, one table per subject, notes below it."""
    lines = [command, "; ".join(f"{key} {value}" for key, value in machine.items())]
    for subject in dict.fromkeys(each.subject for each in findings):
        chosen = [each for each in findings if each.subject == subject]
        lines += ["", subject, *_format_rows([_HEADER, *map(_format_cells, chosen)])]
        notes = [f"  {each.what}: {each.note}" for each in chosen if each.note]
        lines += ["", *notes] if notes else []
    return "\n".join(lines)


def find_exit_code(findings: Sequence[Finding]) -> int:
    """Sum the verdicts up."""
    verdicts = {finding.verdict for finding in findings}
    if verdicts & {"missed", "wrong"}:
        return MISSED
    return NOT_JUDGED if verdicts & {"noisy", "not run"} else ALL_MET


def write_results(folder: Path, name: str, *, table: str, report: str) -> None:
    """Write the table and the JSON of a run, replacing former ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(report + "\n", encoding="utf-8")


def _format_cells(finding: Finding) -> tuple[str, ...]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}x"

    median = ratio(finding.median_ratio)
    if finding.interval is not None:
        median += f" [{finding.interval[0]:.2f}, {finding.interval[1]:.2f}]"
    control = finding.control
    return (
        finding.what,
        _format_value(finding.value),
        finding.unit,
        finding.over,
        ratio(finding.ratio_of_minima),
        median,
        "" if control is None else f"{control[0]:.3f} {control[1]:.3f}",
        finding.target,
        finding.verdict.upper() if finding.verdict != "no target" else "",
    )


def _format_value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _format_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    used = [index for index, column in enumerate(zip(*rows[1:], strict=True)) if any(column)]
    return ["  " + "  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in rows]


def _read_processor() -> str:
    try:
        match = re.search(_PROCESSOR_LINE, Path(_PROCESSOR_FILE).read_text(encoding="utf-8"))
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
