"""Sinks that a run may ask for: found by name, and never allowed to stop training."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence

from fqgan_dist.credentials import scrub
from fqgan_dist.errors import ConfigError
from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.sessions import Session

logger = logging.getLogger(__name__)


def find_sinks(names: Sequence[str]) -> dict[str, Callable[[TrackedRun], MetricSink]]:
    """Import the modules of sinks, and return what builds each.

    Raises:
        ConfigError: the package that a sink needs is not installed.
    """
    return {name: _find_sink(name) for name in names}


def build_sinks(names: Sequence[str], run: TrackedRun) -> list[MetricSink]:
    """Build sinks that, when they fail, say so once and are silent from then on.

    Raises:
        ConfigError: the package that a sink needs is not installed.
    """
    return [_Guarded(name, build(run)) for name, build in find_sinks(names).items()]


def _find_sink(name: str) -> Callable[[TrackedRun], MetricSink]:
    try:
        return importlib.import_module(f"fqgan_dist.telemetry.sinks.{name}").build_sink
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ConfigError(
            f"telemetry.sinks: {name!r} needs the package {package!r}, which is not installed "
            f"in this environment; pip install 'fqgan-dist[{name}]', or take {name!r} out"
        ) from error


class _Guarded:
    """A sink that is switched off at its first error."""

    def __init__(self, name: str, sink: MetricSink) -> None:
        self._name = name
        self._sink: MetricSink | None = sink

    def open(self, session: Session) -> None:
        self._try(lambda sink: sink.open(session))

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:
        self._try(lambda sink: sink.write(step, numbers, images_seen=images_seen))

    def flush(self) -> None:
        self._try(lambda sink: sink.flush())

    def close(self) -> None:
        self._try(lambda sink: sink.close())

    def _try(self, call: Callable[[MetricSink], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as error:  # noqa: BLE001  a service may fail in any way; training goes on
            self._sink = None
            logger.warning(
                "telemetry.sinks: %r has failed and is left out from here on; training goes on, "
                "and metrics.jsonl has all records (%s)",
                self._name,
                # Clients put the address of their service in messages.
                scrub(f"{type(error).__name__}: {error}"),
            )
