"""Observers that keep what they are told."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from fqgan_dist.telemetry.progress import ProgressBar
from fqgan_dist.telemetry.summary import Metric


class RecordingObserver:
    """Keeps what it is told of the progress."""

    def __init__(self) -> None:
        self.bars: list[RecordedBar] = []

    def track(
        self, total: int | None, description: str, unit: str
    ) -> AbstractContextManager[ProgressBar]:
        self.bars.append(RecordedBar(total, description, unit))
        return nullcontext(self.bars[-1])

    def record_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        raise AssertionError("no chunk measures anything")

    def lines(self) -> list[str]:
        """Write what each bar showed at its end: description, units done and total, unit."""
        states = [bar.state() for bar in self.bars]
        return [f"{one.description}: {one.done}/{one.total} {one.unit}" for one in states]


class RecordedBar(ProgressBar):
    def __init__(self, total: int | None, description: str, unit: str) -> None:
        super().__init__(total, description, unit)
        self.advanced: list[int] = []

    def advance(self, count: int = 1, **fields: Metric) -> None:
        super().advance(count, **fields)
        self.advanced.append(count)
