"""Show how far a long piece of work is, and a run's summary as a table.

On a terminal a live bar; elsewhere (log files, `ray job logs`) one plain log line every 10 seconds.
"""

from __future__ import annotations

import io
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    @abstractmethod
    def skip(self, count: int) -> None:
        """Count units that were finished before: they move the bar, but are no throughput."""


@dataclass(frozen=True, kw_only=True)
class WorkProgress:
    """How far a piece of work is."""

    description: str
    """What is being done."""
    unit: str
    """What is counted, in the plural."""
    done: int
    """Finished units, those of earlier sessions included."""
    total: int | None
    """None when it is not known."""
    rate: float | None
    """Units per second; None before there is any."""
    elapsed_s: float
    """Seconds since the work began."""
    fields: Mapping[str, Metric] = field(default_factory=dict)
    """Newest values of what the work measures."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left; False while the total is not known."""
        return self.total is not None and self.done >= self.total

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at this rate; None when total or rate is not known."""
        if self.total is None or not self.rate or self.is_complete:
            return None
        return (self.total - self.done) / self.rate

    def describe(self) -> str:
        """Write it on one line."""
        of_total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.done}{of_total} {self.unit}", f"{self.rate or 0:.1f} {self.unit}/s"]
        if self.left_s is not None:
            parts.append(f"{format_seconds(self.left_s)} left")
        else:
            parts.append(format_seconds(self.elapsed_s))
        if self.fields:
            parts.append(format_fields(self.fields))
        return f"{self.description}: {', '.join(parts)}"


class RateMeter:
    """Units per second of the last minute, from counts read now and then."""

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._readings: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> float | None:
        """Note a count and return the rate; None at the first one.

        Args:
            now: seconds of any clock.
            count: units finished so far; smaller than before when the work began anew.
        """
        if self._readings and count < self._readings[-1][1]:
            self._readings.clear()
        self._readings.append((now, count))
        # The reading before the window stays: work may finish less than one unit in a window.
        while len(self._readings) > 2 and now - self._readings[1][0] >= self._window_s:
            self._readings.popleft()
        (start, first), (end, last) = self._readings[0], self._readings[-1]
        return (last - first) / (end - start) if end > start else None


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
            self._progress.update(self._task, detail=f"{self._unit}  {format_fields(fields)}")
        self._progress.advance(self._task, count)

    def skip(self, count: int) -> None:
        # A reset forgets the samples that the speed is computed from.
        (task,) = self._progress.tasks
        self._progress.reset(self._task, completed=int(task.completed) + count)


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
        self._skipped = 0
        self._count_of_last_line: int | None = None
        self._fields: dict[str, Metric] = {}

    def advance(self, count: int = 1, **fields: Metric) -> None:
        self._count += count
        self._fields |= fields
        if self._clock() - self._last_line >= LINE_INTERVAL_S:
            self._write_line()

    def skip(self, count: int) -> None:
        self._count += count
        self._skipped += count

    def finish(self) -> None:
        if self._count != self._count_of_last_line:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = self._clock()
        self._count_of_last_line = self._count
        elapsed_s = self._last_line - self._start
        state = WorkProgress(
            description=self._description,
            unit=self._unit,
            done=self._count,
            total=self._total,
            rate=(self._count - self._skipped) / elapsed_s if elapsed_s > 0 else None,
            elapsed_s=elapsed_s,
            fields=self._fields,
        )
        logger.info("%s", state.describe())


def format_fields(fields: Mapping[str, Metric]) -> str:
    """Write names and values on one line."""
    return "  ".join(f"{name} {format_number(value)}" for name, value in fields.items())
