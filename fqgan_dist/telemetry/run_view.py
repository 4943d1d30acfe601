"""One console view of a run: every stage with its state, progress, rate and time left.

`RunProgress` holds what is known; it learns from messages that name whole states, never
differences, so that a lost message costs nothing. On a terminal the view is a live table with log
lines passing above it; elsewhere (log files, `ray job logs`) plain log lines.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar as BarGraphic
from rich.table import Table
from rich.text import Text

from fqgan_dist.telemetry.console_streams import handlers_follow_streams
from fqgan_dist.telemetry.progress import (
    LINE_INTERVAL_S,
    RateMeter,
    WorkProgress,
    WorkState,
    format_fields,
)
from fqgan_dist.telemetry.summary import Metric, format_seconds
from fqgan_dist.terminal import printable

StageState = Literal["waiting", "running", "done", "skipped", "failed"]

WAITING_LINE_INTERVAL_S = 30.0
_POLL_INTERVAL_S = 1.0
_REFRESHES_PER_S = 2.0
_BAR_WIDTH = 20
_STATE_STYLES: dict[StageState, str] = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "skipped": "green",
    "failed": "bold red",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkUpdate(WorkState):
    """A message: the state of one piece of work, as the process that does it knows it."""

    stage: str
    work_id: str
    """Differs between pieces of work, and between attempts at one."""


@dataclass(frozen=True, kw_only=True)
class MetricsUpdate:
    """A message: the newest metrics of a stage."""

    stage: str
    step: int
    values: Mapping[str, float]
    """`<stage>/<group>/<name>` -> value."""


Update = WorkUpdate | MetricsUpdate


@dataclass(frozen=True, kw_only=True)
class StageView:
    """One stage as it is shown."""

    name: str
    state: StageState = "waiting"
    seconds: float | None = None
    """Since it began, until it ended; None before."""
    work: WorkProgress | None = None
    """Its newest piece of work."""
    driver_waiting: str = ""
    """What the driver waits for on its behalf; "" if nothing."""

    @property
    def waiting(self) -> str:
        """What it waits for; "" if nothing worth a word."""
        return self.driver_waiting or ("" if self.work is None else self.work.waiting)

    def describe(self) -> str:
        text = self.state if self.work is None else self.work.describe()
        return f"{self.name}: " + ", ".join(filter(None, [text, self.driver_waiting]))


class RunProgress:
    """What is known of a run's stages; safe to use from several threads."""

    def __init__(
        self, stages: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._stages = {name: _StageEntry() for name in stages}

    def start(self, stage: str) -> None:
        """Note that a stage began; its first message does so too."""
        with self._lock:
            self._entry(stage).start(self._clock())

    def finish(self, stage: str, state: StageState) -> None:
        """Note how a stage ended."""
        with self._lock:
            entry = self._entry(stage)
            entry.state = state
            entry.ended = self._clock()

    def apply(self, update: Update) -> None:
        """Take a message in; one of a former attempt is late, and counts no more.

        The last message of a stage may come after its end: it changes numbers, not the state.
        """
        with self._lock:
            now = self._clock()
            entry = self._entry(update.stage)
            entry.start(now)
            if isinstance(update, MetricsUpdate):
                entry.metrics.update(_shown_metrics(update.values))
            else:
                entry.take_work(update, now)

    def stages(self) -> tuple[StageView, ...]:
        with self._lock:
            now = self._clock()
            return tuple(entry.view(name, now) for name, entry in self._stages.items())

    def _entry(self, stage: str) -> _StageEntry:
        return self._stages.setdefault(stage, _StageEntry())


def render_run(stages: Sequence[StageView], *, title: str) -> Table:
    """Draw the stages as a table."""
    # Text, not str: rich would read [brackets] as markup.
    table = Table(
        title=Text(printable(title)), box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left"
    )
    for name in ("stage", "state", "time"):
        table.add_column(name, no_wrap=True)
    for name in ("", "done", "rate", "left", ""):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for stage in stages:
        state = Text(stage.state, style=_STATE_STYLES[stage.state])
        seconds = "" if stage.seconds is None else format_seconds(stage.seconds)
        table.add_row(Text(printable(stage.name)), state, seconds, *_work_cells(stage))
    return table


@contextmanager
def show_run(
    load_stages: Callable[[], Sequence[StageView]],
    *,
    title: str,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Show a run while the block runs, from a thread of its own.

    `load_stages` gives the stages as of now; it is called about once a second, and at the end. The
    console is standard error by default; where it is no terminal, there are log lines instead.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = _LineReporter(clock)
        with _polling(lambda: lines.report(load_stages())):
            yield
        return
    shown = _LatestTable(title)
    shown.update(load_stages())
    streams = (sys.stdout, sys.stderr)
    with (
        Live(console=console, get_renderable=shown.table, refresh_per_second=_REFRESHES_PER_S),
        handlers_follow_streams(streams),
        _polling(lambda: shown.update(load_stages())),
    ):
        yield


@dataclass
class _StageEntry:
    state: StageState = "waiting"
    started: float | None = None
    ended: float | None = None
    work: WorkUpdate | None = None
    work_started: float = 0.0
    former_works: set[str] = field(default_factory=set)
    meter: RateMeter = field(default_factory=RateMeter)
    rate: float | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)

    def start(self, now: float) -> None:
        if self.state == "waiting":
            self.state = "running"
            self.started = now

    def take_work(self, update: WorkUpdate, now: float) -> None:
        if update.work_id in self.former_works:
            return
        if self.work is None or self.work.work_id != update.work_id:
            if self.work is not None:
                self.former_works.add(self.work.work_id)
            self.work_started = now
            self.meter = RateMeter()
            self.metrics = {}
        self.work = update
        self.rate = self.meter.add(now, update.done - update.skipped)

    def view(self, name: str, now: float) -> StageView:
        end = now if self.ended is None else self.ended
        return StageView(
            name=name,
            state=self.state,
            seconds=None if self.started is None else end - self.started,
            work=None if self.work is None else self._view_work(self.work, end),
        )

    def _view_work(self, work: WorkUpdate, end: float) -> WorkProgress:
        return WorkProgress(
            description=work.description,
            unit=work.unit,
            done=work.done,
            skipped=work.skipped,
            total=work.total,
            rate=self.rate,
            elapsed_s=end - self.work_started,
            fields={**self.metrics, **work.fields},
            waiting=work.waiting,
        )


def _shown_metrics(values: Mapping[str, float]) -> dict[str, Metric]:
    shown: dict[str, Metric] = {}
    for name, value in values.items():
        if name.endswith("/loss/total"):
            shown["loss"] = value
        elif name == "train/images_per_s":
            shown["images/s"] = value
    return shown


def _work_cells(stage: StageView) -> tuple[BarGraphic | Text | str, ...]:
    work = stage.work
    if work is None:
        return ("", "", "", "", Text(printable(stage.waiting), style="yellow"))
    bar = BarGraphic(total=work.total, completed=work.done, width=_BAR_WIDTH)
    of_total = "" if work.total is None else f"/{work.total}"
    rate = "" if work.rate is None else f"{work.rate:.1f}/s"
    left = "" if work.left_s is None else format_seconds(work.left_s)
    detail = Text(
        printable(f"{work.description}  {format_fields(work.fields)}".rstrip()), style="dim"
    )
    if stage.waiting:
        left, detail = "", Text(printable(stage.waiting), style="yellow")
    return (bar, printable(f"{work.done}{of_total} {work.unit}"), rate, left, detail)


class _LatestTable:
    """What the live display draws; loading it is another thread's work, and may take its time."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._table = Table()

    def update(self, stages: Sequence[StageView]) -> None:
        self._table = render_run(stages, title=self._title)

    def table(self) -> Table:
        return self._table


class _LineReporter:
    """Log a line per running stage every ten seconds, and one at the end of each work."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_time: dict[str, float] = {}
        self._last_done: dict[str, tuple[str, int]] = {}

    def report(self, stages: Sequence[StageView]) -> None:
        now = self._clock()
        for stage in stages:
            if stage.work is None and not stage.waiting:
                continue
            done, is_complete = ("", 0), False
            if stage.work is not None:
                done = (stage.work.description, stage.work.done)
                is_complete = stage.work.is_complete
            interval_s = WAITING_LINE_INTERVAL_S if stage.waiting else LINE_INTERVAL_S
            last_time = self._last_time.setdefault(stage.name, now)
            is_due = is_complete or now - last_time >= interval_s
            if is_due and (stage.waiting or self._last_done.get(stage.name) != done):
                self._last_time[stage.name] = now
                self._last_done[stage.name] = done
                logger.info("%s", stage.describe())


@contextmanager
def _polling(poll: Callable[[], None]) -> Iterator[None]:
    """Call something every second from another thread while the block runs, and at its end."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(_POLL_INTERVAL_S):
            poll()

    thread = threading.Thread(target=run, name="run-view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        poll()
