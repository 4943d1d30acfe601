"""MLflow; where and as whom it writes is said by MLflow's own variables.

MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_TOKEN or _USERNAME and _PASSWORD.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

# MLflow would tell its makers how it is used, from its import on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.sessions import Session

_TAG = "fqgan_dist.id"


def build_sink(run: TrackedRun) -> MetricSink:
    return _MLflow(run)


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def open(self, session: Session) -> None:  # noqa: ARG002  MLflow knows how far its history is
        self._client = MlflowClient()
        self._last_sent: dict[str, int] = {}
        self._id, self._is_continued = self._find_or_create()
        self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        now_ms = int(1000 * time.time())
        values = {**numbers, "images_seen": images_seen}
        # A history cannot be cut: what a killed session had sent stays, and is not sent again.
        new = [
            Metric(name, value, now_ms, step)
            for name, value in values.items()
            if step > self._last_step_sent(name)
        ]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def flush(self) -> None:
        """Do nothing: records are sent as they are written."""

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _find_or_create(self) -> tuple[str, bool]:
        """Return MLflow's id of this training, and whether a former session made it."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fqgan-dist")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        # MLflow chooses its ids itself, so a tag tells which run is ours.
        tag = self._run.load_id()
        found = self._client.search_runs([experiment], filter_string=f"tags.`{_TAG}` = '{tag}'")
        if found:
            return found[0].info.run_id, True
        title = f"{self._run.name} {self._run.stage}"
        made = self._client.create_run(experiment, tags={_TAG: tag}, run_name=title)
        return made.info.run_id, False

    def _last_step_sent(self, name: str) -> int:
        """Return the last step at which former sessions sent a metric, or -1."""
        if name not in self._last_sent:
            history = self._client.get_metric_history(self._id, name) if self._is_continued else []
            self._last_sent[name] = max((point.step for point in history), default=-1)
        return self._last_sent[name]
