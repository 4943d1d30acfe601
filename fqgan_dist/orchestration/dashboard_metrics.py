"""The run's numbers as metrics of Ray's dashboard: Prometheus gauges of the node that sets them.

Ray exports them under `ray_fqgan_...`, from the metrics port of the node on which they are set.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.util.metrics import Gauge

from fqgan_dist.telemetry.progress import RateMeter
from fqgan_dist.telemetry.run_view import MetricsUpdate, Update, WorkUpdate


class RunGauges:
    """Gauges of one run, set from the messages that the progress board gets."""

    def __init__(self, run: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Make the gauges, which have the run's name as a tag."""
        self._run = run
        self._clock = clock
        self._meters: dict[str, RateMeter] = {}
        self._progress = Gauge(
            "fqgan_stage_progress",
            description="Finished share of a stage's present work, 0 to 1.",
            tag_keys=("run", "stage", "work"),
        )
        self._done = Gauge(
            "fqgan_units_done",
            description="Finished units (steps, images, samples) of a stage's present work.",
            tag_keys=("run", "stage", "work", "unit"),
        )
        self._rate = Gauge(
            "fqgan_units_per_s",
            description="Units per second of a stage's present work, over the last minute.",
            tag_keys=("run", "stage", "work", "unit"),
        )
        self._step = Gauge(
            "fqgan_step",
            description="Optimizer steps done when the metrics were logged.",
            tag_keys=("run", "stage"),
        )
        self._metric = Gauge(
            "fqgan_metric",
            description="Newest value of a metric of metrics.jsonl: losses, train/images_per_s.",
            tag_keys=("run", "stage", "metric"),
        )

    def apply(self, update: Update) -> None:
        if isinstance(update, MetricsUpdate):
            self._apply_metrics(update)
        else:
            self._apply_work(update)

    def _apply_work(self, update: WorkUpdate) -> None:
        tags = self._tags(update.stage, work=update.description)
        if update.total:
            self._progress.set(update.done / update.total, tags)
        self._done.set(update.done, {**tags, "unit": update.unit})
        meter = self._meters.setdefault(update.work_id, RateMeter())
        rate = meter.add(self._clock(), update.done - update.skipped)
        if rate is not None:
            self._rate.set(rate, {**tags, "unit": update.unit})

    def _apply_metrics(self, update: MetricsUpdate) -> None:
        self._step.set(update.step, self._tags(update.stage))
        for name, value in update.values.items():
            self._metric.set(value, self._tags(update.stage, metric=name))

    def _tags(self, stage: str, **more: str) -> dict[str, str]:
        return {"run": self._run, "stage": stage, **more}
