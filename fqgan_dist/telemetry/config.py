"""Settings of what a run tells of itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from pathlib import Path

from fqgan_dist.config import Config, describe_unknown


def sink_names() -> list[str]:
    """List the sinks that may be asked for: the modules in `telemetry/sinks/`, not imported.

    Where one needs a package that the project does not, an extra of its name brings it.
    """
    return sorted(
        module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "sinks")])
    )


class TelemetryConfig(Config):
    """Where a training's metrics go; `metrics.jsonl` is always written."""

    sinks: tuple[str, ...] = ("tensorboard",)
    """Services that are given every record too: `tensorboard`, `wandb`, `mlflow`. Where theirs is
    and who may write there, the last two read from their own environment variables. One that fails
    is left out; training goes on."""

    def find_problems(self) -> Iterator[str]:
        for name in sorted(set(self.sinks)):
            if name not in sink_names():
                yield f"sinks: {name!r} is no sink; {describe_unknown(name, sink_names())}"
            elif self.sinks.count(name) > 1:
                yield f"sinks: {name} is named twice; name each once"
