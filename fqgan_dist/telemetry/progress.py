"""Show how far a long piece of work is, and a run's summary as a table.

On a terminal a live bar; elsewhere (log files, `ray job logs`) one plain log line every 10 seconds.
"""

from __future__ import annotations

import io
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fqgan_dist.telemetry.summary import (
    Metric,
    format_number,
    format_seconds,
    parse_summary,
)

LINE_INTERVAL_S = 10.0

logger = logging.getLogger(__name__)


class ProgressBar(ABC):
    """What the body of `track` advances."""

    @abstractmethod
    def advance(self, count: int = 1, **fields: Metric) -> None:
        """Add finished units and show the newest values of some fields, for example `loss=0.31`."""


@contextmanager
def track(
    total: int | None,
    description: str,
    unit: str = "it",
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressBar]:
    """Show the progress of the block, which calls `advance` on what it is given.

    Args:
        total: number of units; None when it is not known.
        description: what is being done.
        unit: what is counted, in the plural.
        console: where to draw; standard error by default. Not a terminal: log lines instead.
        clock: source of seconds for the log lines' interval and rate.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = _LineProgress(total, description, unit, clock)
        yield lines
        lines.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _LiveProgress(progress, total, description, unit)


def render_summary(summary: Mapping[str, Any], *, width: int = 100) -> str:
    """Render a summary (stage -> state, seconds, metrics) as a plain text table.

    Raises:
        ValueError: the summary is not of that form.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("metrics")
    for stage in parse_summary(summary).values():
        metrics = "\n".join(f"{name} = {format_number(v)}" for name, v in stage.metrics.items())
        # Text, not str: rich would read [brackets] in a name as markup.
        cells = (stage.name, stage.state, format_seconds(stage.seconds), metrics)
        table.add_row(*(Text(cell) for cell in cells))
    output = io.StringIO()
    Console(file=output, width=width, color_system=None).print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


class _LiveProgress(ProgressBar):
    def __init__(self, progress: Progress, total: int | None, description: str, unit: str) -> None:
        self._progress = progress
        self._unit = unit
        self._task = progress.add_task(description, total=total, detail=unit)

    def advance(self, count: int = 1, **fields: Metric) -> None:
        if fields:
            self._progress.update(self._task, detail=f"{self._unit}  {_format_fields(fields)}")
        self._progress.advance(self._task, count)


class _LineProgress(ProgressBar):
    def __init__(
        self, total: int | None, description: str, unit: str, clock: Callable[[], float]
    ) -> None:
        self._total = total
        self._description = description
        self._unit = unit
        self._clock = clock
        self._start = self._last_line = clock()
        self._count = 0
        self._count_of_last_line: int | None = None
        self._fields: dict[str, Metric] = {}

    def advance(self, count: int = 1, **fields: Metric) -> None:
        self._count += count
        self._fields |= fields
        if self._clock() - self._last_line >= LINE_INTERVAL_S:
            self._write_line()

    def finish(self) -> None:
        if self._count != self._count_of_last_line:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = self._clock()
        self._count_of_last_line = self._count
        elapsed = self._last_line - self._start
        rate = self._count / elapsed if elapsed > 0 else 0.0
        of_total = "" if self._total is None else f"/{self._total}"
        parts = [f"{self._count}{of_total} {self._unit}", f"{rate:.1f} {self._unit}/s"]
        if self._total is not None and self._count < self._total and rate > 0:
            parts.append(f"{format_seconds((self._total - self._count) / rate)} left")
        else:
            parts.append(format_seconds(elapsed))
        if self._fields:
            parts.append(_format_fields(self._fields))
        logger.info("%s: %s", self._description, ", ".join(parts))


def _format_fields(fields: Mapping[str, Metric]) -> str:
    return "  ".join(f"{name} {format_number(value)}" for name, value in fields.items())
