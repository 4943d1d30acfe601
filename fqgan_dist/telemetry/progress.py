"""Show how far a long piece of work is, and a run's summary as a table.

On a terminal a live bar; elsewhere (log files, `ray job logs`) one plain log line every 10 seconds.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar as BarGraphic
from rich.table import Column, Table
from rich.text import Text

from fqgan_dist.telemetry.summary import (
    Metric,
    format_number,
    format_seconds,
    parse_summary,
)
from fqgan_dist.terminal import Lines, join_lines, printable
from fqgan_dist.waiting import WAITS

LINE_INTERVAL_S = 10.0

_REFRESHES_PER_S = 4.0
_BAR_WIDTH = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkState:
    """How much of a piece of work is done."""

    description: str
    unit: str
    done: int
    """Finished units, those of earlier sessions included."""
    skipped: int
    """Of these, units of earlier sessions, which are no throughput."""
    total: int | None
    """None when it is not known."""
    fields: Mapping[str, Metric] = field(default_factory=dict)
    """Newest values of what the work measures."""
    waiting: str = ""
    """What its process waits for; "" if nothing worth a word."""


@dataclass(frozen=True, kw_only=True)
class WorkProgress(WorkState):
    """How far a piece of work is, and how fast."""

    rate: float | None
    """Units per second of this session; None before there is any."""
    elapsed_s: float
    """Seconds since the work began."""

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
        return f"{self.description}: {self.describe_amounts()}"

    def describe_amounts(self) -> str:
        """Write how much is done, how fast, and what the work measures."""
        of_total = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.done}{of_total} {self.unit}", f"{self.rate or 0:.1f} {self.unit}/s"]
        if self.left_s is not None:
            parts.append(f"{format_seconds(self.left_s)} left")
        else:
            parts.append(format_seconds(self.elapsed_s))
        if self.fields:
            parts.append(format_fields(self.fields))
        if self.waiting:
            parts.append(self.waiting)
        return ", ".join(parts)


class ProgressBar:
    """Counts the finished units of a piece of work; whoever shows them reads `state` or `progress`.

    It shows nothing itself. One thread may advance it while others read.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        unit: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._description = description
        self._unit = unit
        self._clock = clock
        self._start = clock()
        self._lock = threading.Lock()
        self._done = self._skipped = 0
        self._fields: dict[str, Metric] = {}

    def advance(self, count: int = 1, **fields: Metric) -> None:
        """Add finished units and keep the newest values of some fields, for example `loss=0.31`."""
        with self._lock:
            self._done += count
            self._fields |= fields

    def advance_to(self, done: int) -> None:
        self.advance(done - self._done)

    def skip(self, count: int) -> None:
        """Count units that were finished before: they move the bar, but are no throughput."""
        with self._lock:
            self._done += count
            self._skipped += count

    def state(self) -> WorkState:
        """Tell how much is done, and what this process waits for."""
        wait = WAITS.longest()
        with self._lock:
            return WorkState(
                description=self._description,
                unit=self._unit,
                done=self._done,
                skipped=self._skipped,
                total=self._total,
                fields=dict(self._fields),
                waiting="" if wait is None else str(wait),
            )

    def progress(self) -> WorkProgress:
        """Tell how far the work is, at its mean rate."""
        state, elapsed_s = self.state(), self._clock() - self._start
        rate = (state.done - state.skipped) / elapsed_s if elapsed_s > 0 else None
        return WorkProgress(**vars(state), rate=rate, elapsed_s=elapsed_s)


class RateMeter:
    """Units per second of the last minute, from counts read now and then."""

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._readings: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> float | None:
        """Note how many units are finished at a time, and return the rate; None at the first one.

        A count that is smaller than before means that the work began anew.
        """
        if self._readings and count < self._readings[-1][1]:
            self._readings.clear()
        # Only what changes is noted, and the reading before the window stays: work may finish less
        # than one unit in a window, however often it is looked at.
        if not self._readings or count > self._readings[-1][1]:
            self._readings.append((now, count))
        while len(self._readings) > 2 and now - self._readings[1][0] >= self._window_s:
            self._readings.popleft()
        (start, first), (end, last) = self._readings[0], self._readings[-1]
        return (last - first) / (end - start) if end > start else None


@contextmanager
def track(
    total: int | None,
    description: str,
    unit: str,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressBar]:
    """Show the progress of the block, which calls `advance` on what it is given.

    On the console, standard error by default; where that is no terminal, by log lines.
    """
    console = console or Console(stderr=True)
    if total == 0:
        yield ProgressBar(total, description, unit)  # nothing to do is no news
        return
    if not console.is_terminal:
        lines = _LoggedBar(total, description, unit, clock=clock)
        yield lines
        lines.finish()
        return
    bar, meter = ProgressBar(total, description, unit, clock=clock), RateMeter()

    def draw() -> Table:
        now = bar.progress()
        return _draw(replace(now, rate=meter.add(clock(), now.done - now.skipped)))

    with Live(console=console, get_renderable=draw, refresh_per_second=_REFRESHES_PER_S):
        yield bar


def render_summary(summary: Mapping[str, Any], *, width: int = 100) -> Lines:
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
        metrics = join_lines(f"{name} = {format_number(v)}" for name, v in stage.metrics.items())
        # Text, not str: rich would read [brackets] in a name as markup.
        cells = (stage.name, stage.state, format_seconds(stage.seconds))
        table.add_row(*(Text(printable(cell)) for cell in cells), Text(metrics))
    return render_text(table, width=width)


def render_text(*parts: Table | Text, width: int) -> Lines:
    """Draw what rich draws as plain text, without blanks at the ends; cells must be printable."""
    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None)
    for part in parts:
        console.print(part)
    lines = [line.rstrip() for line in output.getvalue().split("\n")]
    return Lines(join_lines(lines).strip("\n"))


class _LoggedBar(ProgressBar):
    """Writes a log line every ten seconds, and one at the end."""

    def __init__(
        self, total: int | None, description: str, unit: str, *, clock: Callable[[], float]
    ) -> None:
        super().__init__(total, description, unit, clock=clock)
        self._last_line = self._start
        self._done_of_last_line: int | None = None

    def advance(self, count: int = 1, **fields: Metric) -> None:
        super().advance(count, **fields)
        if self._clock() - self._last_line >= LINE_INTERVAL_S:
            self._write_line()

    def finish(self) -> None:
        if self._done != self._done_of_last_line:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = self._clock()
        self._done_of_last_line = self._done
        logger.info("%s", self.progress().describe())


def _draw(work: WorkProgress) -> Table:
    table = Table.grid(
        Column(no_wrap=True), Column(), Column(no_wrap=True, overflow="ellipsis"), padding=(0, 1)
    )
    # Text, not str: rich would read [brackets] as markup.
    table.add_row(
        Text(printable(work.description)),
        BarGraphic(total=work.total, completed=work.done, width=_BAR_WIDTH),
        Text(printable(work.describe_amounts()), style="dim"),
    )
    return table


def format_fields(fields: Mapping[str, Metric]) -> str:
    return "  ".join(f"{name} {format_number(value)}" for name, value in fields.items())
