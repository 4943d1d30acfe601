"""Settings of what a run tells of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fqgan_dist.config import Config

SinkName = Literal["tensorboard", "wandb", "mlflow"]
"""Sinks that may be asked for: each is the module of that name in `telemetry/sinks/`, and where it
needs a package that the project does not, an extra of that name."""


class TelemetryConfig(Config):
    """Where a training's metrics go; `metrics.jsonl` is always written."""

    sinks: tuple[SinkName, ...] = ("tensorboard",)
    """Services that are given every record too. Where theirs is and who may write there, `wandb`
    and `mlflow` read from their own environment variables. One that fails is left out; training
    goes on."""

    def find_problems(self) -> Iterator[str]:
        """Find sinks that are named twice."""
        for name in sorted({name for name in self.sinks if self.sinks.count(name) > 1}):
            yield f"sinks: {name} is named twice; name each once"
