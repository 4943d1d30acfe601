"""TensorBoard's event files, in `tensorboard/` beside `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.published import PublishedFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def build_sink(run: TrackedRun) -> MetricSink:
    return _TensorBoard(run)


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def open(self, resumed_step: int) -> None:
        # Imported here: only a process that trains pays for it.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder = PublishedFolder(self._run.storage, f"{self._run.stage}/tensorboard")
        # TensorBoard hides what a killed session logged from the purge step on.
        self._writer: SummaryWriter = SummaryWriter(
            str(self._folder.local), purge_step=resumed_step + 1
        )

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:  # noqa: ARG002  part of MetricSink
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()  # events wait for two minutes otherwise
        self._folder.publish()

    def close(self) -> None:
        self._writer.close()
        self._folder.close()
