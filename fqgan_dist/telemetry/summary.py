"""Read `summary.json` (stage -> state, seconds, metrics) and write its numbers for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Metric = float | int | bool | str | None
"""A leaf of a stage's metrics."""


@dataclass(frozen=True)
class OtherRecord:
    """What a run also holds of a stage, made from other inputs than those of its config."""

    state: str
    inputs: dict[str, Metric]
    """Those that differ."""
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class StageSummary:
    """One stage of a run, metrics flattened to dotted names (`perplexity.visual`)."""

    name: str
    state: str
    """For example done, skipped, started, failed."""
    seconds: float | None
    """Wall time; None when the stage has not finished."""
    metrics: dict[str, Metric]
    others: tuple[OtherRecord, ...] = ()

    def number(self, name: str) -> float | None:
        """Return a metric as a float; None when it is absent or not a finite number."""
        value = self.metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if math.isfinite(value) else None

    def group(self, name: str) -> dict[str, float]:
        """Return the finite numbers below a dotted name, for example per codebook."""
        prefix = name + "."
        numbers = {key: self.number(key) for key in self.metrics if key.startswith(prefix)}
        return {
            key.removeprefix(prefix): value for key, value in numbers.items() if value is not None
        }


def parse_summary(summary: Mapping[str, Any]) -> dict[str, StageSummary]:
    """Read the stages of a summary in their order.

    Raises:
        ValueError: a stage is not a mapping, or its metrics are not.
    """
    return {name: _parse_stage(name, stage) for name, stage in summary.items()}


def format_number(value: Metric) -> str:
    """Write a value with about four significant digits; thousands are set apart by thin groups."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return format_number(int(value))
    magnitude = abs(value)
    if magnitude < 1e-3:
        return f"{value:.2e}"
    if magnitude >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.{3 if magnitude < 10 else 2 if magnitude < 100 else 1}f}"


def format_seconds(seconds: float | None) -> str:
    """Write a duration as `4.2 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _parse_stage(name: str, stage: Any) -> StageSummary:
    if not isinstance(stage, Mapping):
        raise ValueError(
            f"summary: stage {name!r} is {stage!r}; expected a mapping of state, seconds, metrics"
        )
    metrics = _parse_mapping(f"{name}.metrics", stage.get("metrics") or {})
    seconds = stage.get("seconds")
    others = [_parse_mapping(f"{name}.others", other) for other in stage.get("others") or []]
    return StageSummary(
        name=name,
        state=str(stage.get("state", "unknown")),
        seconds=None if seconds is None else float(seconds),
        metrics=dict(_flatten(metrics, "")),
        others=tuple(
            OtherRecord(
                state=str(other.get("state", "unknown")),
                inputs=dict(_flatten(_parse_mapping(f"{name}.inputs", other.get("inputs")), "")),
                metrics=dict(_flatten(_parse_mapping(f"{name}.metrics", other.get("metrics")), "")),
            )
            for other in others
        ),
    )


def _parse_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"summary: {name} is {value!r}; expected a mapping")
    return value


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Metric]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, name + ".")
        elif isinstance(value, list | tuple):
            yield from _flatten({str(i): item for i, item in enumerate(value)}, name + ".")
        elif value is None or isinstance(value, bool | int | float | str):
            yield name, value
        else:
            raise ValueError(
                f"summary: metric {name!r} is {value!r}; expected a number, text or a mapping"
            )
