"""What running work tells whoever watches it: how far it is, and its newest numbers.

Work knows an `Observer` only. In one process that is a progress bar; on a cluster it is a message
to the run's progress board (orchestration/progress_board.py).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from fqgan_dist.telemetry.progress import ProgressBar, track
from fqgan_dist.telemetry.sessions import Session


class Observer(Protocol):
    """Is told about work; small and picklable, as it travels to the process that works.

    It never fails or blocks the work that it watches.
    """

    def track(
        self, total: int | None, description: str, unit: str
    ) -> AbstractContextManager[ProgressBar]:
        """Watch the block, which calls `advance` on what it is given; `unit` is in the plural."""
        ...

    def record_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Note the newest values of some metrics of the stage that trains."""
        ...


class SilentObserver:
    """Show nothing, for callers who do not want to know."""

    def track(
        self, total: int | None, description: str, unit: str
    ) -> AbstractContextManager[ProgressBar]:
        return nullcontext(ProgressBar(total, description, unit))

    def record_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: in one process the metrics file is at hand."""


SILENT = SilentObserver()


@dataclass(frozen=True)
class LocalObserver(SilentObserver):
    """Show progress in this process: a live bar on a terminal, else log lines."""

    has_bar: bool = True
    """False: log lines also on a terminal, for ranks that share it with another one's bar."""

    def track(
        self, total: int | None, description: str, unit: str
    ) -> AbstractContextManager[ProgressBar]:
        console = None if self.has_bar else Console(file=io.StringIO())
        return track(total, description, unit, console=console)


class ObserverSink:
    """Passes a training's metrics on to an observer; a `MetricSink` (metric_sink.py)."""

    def __init__(self, observer: Observer, stage: str) -> None:
        self._observer = observer
        self._stage = stage

    def open(self, session: Session) -> None:
        """Do nothing: an observer has no history."""

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:  # noqa: ARG002  part of MetricSink
        self._observer.record_metrics(self._stage, step, numbers)

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
