"""Weights & Biases; where and as whom it writes is said by W&B's own variables.

WANDB_API_KEY, WANDB_ENTITY, WANDB_PROJECT, WANDB_BASE_URL, and WANDB_MODE=offline for machines
without access: `wandb sync <stage>/tracking/wandb/offline-run-*` uploads later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import wandb

from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.published import PublishedFolder
from fqgan_dist.telemetry.sessions import Session


def build_sink(run: TrackedRun) -> MetricSink:
    return _WeightsAndBiases(run)


class _WeightsAndBiases:
    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def open(self, session: Session) -> None:  # noqa: ARG002  W&B knows how far its history is
        self._folder = PublishedFolder(self._run.storage, self._run.folder)
        self._session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fqgan-dist"),
            name=f"{self._run.name} {self._run.stage}",
            id=self._run.load_id(),
            resume="allow",
            dir=self._folder.local,
            # Its own run, whatever else the process tracks, and nothing but metrics.
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
                login_timeout=30,  # without a key it would ask a terminal for one, and wait
            ),
        )

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        # A history cannot be cut: what a killed session had sent stays, and is not sent again.
        if step >= self._session.starting_step:
            self._session.log({**numbers, "images_seen": images_seen}, step=step)

    def flush(self) -> None:
        self._folder.publish()  # W&B sends by itself; these are the files of an offline session

    def close(self) -> None:
        self._session.finish()
        wandb.teardown()  # finish does not wait until W&B's own process has written its file
        self._folder.publish()
        self._folder.close()
