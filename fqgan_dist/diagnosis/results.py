"""The verdicts of all nodes, for people and for machines."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fqgan_dist.diagnosis.verdict import Status, Verdict
from fqgan_dist.terminal import Lines, join_lines

CLUSTER, THIS_MACHINE = "cluster", "this machine"
"""Titles of groups; those of nodes are their labels."""
RAY = "Ray"

_SHOWN: dict[Status, str] = {"ok": "ok", "warning": "warning", "failed": "FAILED"}


@dataclass(frozen=True)
class Diagnosis:
    """What `fqgan doctor` found."""

    groups: Mapping[str, Sequence[Verdict]]
    """Verdicts by title: the cluster, then each node."""
    notes: Sequence[str] = ()
    """What was not looked at, and why."""

    @property
    def has_failed(self) -> bool:
        return self._counts["failed"] > 0

    @property
    def report(self) -> dict[str, Any]:
        """For machines; JSON-able."""
        return {
            "counts": dict(self._counts),
            "groups": {
                title: [asdict(verdict) for verdict in verdicts]
                for title, verdicts in self.groups.items()
            },
            "notes": list(self.notes),
        }

    @property
    def text(self) -> Lines:
        """For people: one line per verdict."""
        lines: list[str] = []
        for title, verdicts in self.groups.items():
            lines += [title, *(f"  {line}" for line in _format(verdicts)), ""]
        lines += [f"note: {note}" for note in self.notes]
        counts = self._counts
        lines.append(
            f"ok: {counts['ok']}, warnings: {counts['warning']}, failed: {counts['failed']}"
        )
        return join_lines(lines)

    @property
    def _counts(self) -> Counter[str]:
        counts: Counter[str] = Counter(dict.fromkeys(_SHOWN, 0))
        counts.update(verdict.status for group in self.groups.values() for verdict in group)
        return counts


def _format(verdicts: Sequence[Verdict]) -> list[str]:
    width = max((len(verdict.check) for verdict in verdicts), default=0)
    return [
        f"{_SHOWN[verdict.status]:7}  {verdict.check:{width}}  {_one_line(verdict)}"
        for verdict in verdicts
    ]


def _one_line(verdict: Verdict) -> str:
    # Errors of libraries may have several lines.
    advice = f" -> {verdict.advice}" if verdict.advice else ""
    return textwrap.shorten(f"{verdict.finding}{advice}", 1000, placeholder=" ...")
