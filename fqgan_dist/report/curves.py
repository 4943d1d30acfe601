"""Arrange a stage's metrics into panels of curves: one per metric, its codebooks together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fqgan_dist.report.inputs import ReportInputs
from fqgan_dist.telemetry.metrics import RESERVED_NAMES, Record, metric_series
from fqgan_dist.telemetry.summary import StageSummary

_UNITS = {
    "_per_s": " per second",
    "_gib": " (GiB)",
    "_bytes": " (bytes)",
    "_ms": " (ms)",
    "_s": " (s)",
}


@dataclass(frozen=True)
class Curve:
    """One line: values over optimizer steps."""

    label: str
    """Codebook name; empty where a panel has one line."""
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Reference:
    """A level to compare a curve with, drawn as a dashed line."""

    label: str
    value: float


@dataclass(frozen=True)
class Panel:
    """One small figure."""

    stage: str
    group: str
    """For example loss, validation, train, system; empty for metrics without one."""
    title: str
    curves: list[Curve]
    reference: Reference | None = None


def arrange_panels(inputs: ReportInputs) -> dict[str, list[Panel]]:
    """Build each stage's panels; stages without any metric are left out."""
    codebooks = inputs.codebook_names
    arranged: dict[str, list[Panel]] = {}
    for stage, records in inputs.metrics.items():
        references = _find_references(inputs.stages.get(stage))
        panels = _arrange_stage(stage, records, codebooks, references)
        if panels:
            arranged[stage] = panels
    return arranged


def humanise(name: str) -> str:
    """Write a metric or stage name with spaces and its unit: `step_ms` as `step (ms)`."""
    for suffix, unit in _UNITS.items():
        if name.endswith(suffix):
            name = name.removesuffix(suffix) + unit
            break
    return name.replace("_", " ").replace(".", " ").replace("/", " / ")


def _arrange_stage(
    stage: str,
    records: Sequence[Record],
    codebooks: Sequence[str],
    references: Mapping[str, Reference],
) -> list[Panel]:
    names = dict.fromkeys(name for record in records for name in record)
    curves: dict[tuple[str, str], list[Curve]] = {}
    for name in names:
        if name in RESERVED_NAMES:
            continue
        steps, values = metric_series(records, name)
        if steps:
            metric, codebook = _split_codebook(name.removeprefix(f"{stage}/"), codebooks)
            group, _, title = metric.rpartition("/")
            curves.setdefault((group, title), []).append(Curve(codebook, steps, values))
    return [
        Panel(stage, group, title, _in_order(lines, codebooks), references.get(title))
        for (group, title), lines in curves.items()
    ]


def _split_codebook(name: str, codebooks: Sequence[str]) -> tuple[str, str]:
    # Longest first: a codebook may be called "mid" beside "semantic_mid".
    for codebook in sorted(codebooks, key=len, reverse=True):
        for separator in "/_.":
            if name.endswith(separator + codebook):
                return name.removesuffix(separator + codebook), codebook
    return name, ""


def _in_order(curves: list[Curve], codebooks: Sequence[str]) -> list[Curve]:
    # The mean over codebooks, which has no label, comes first.
    order = {"": -1} | {name: index for index, name in enumerate(codebooks)}
    return sorted(curves, key=lambda curve: order[curve.label])


def _find_references(stage: StageSummary | None) -> dict[str, Reference]:
    if stage is None:
        return {}
    references: dict[str, Reference] = {}
    mean_image = stage.number("psnr_mean_image")
    if mean_image is not None:
        references["psnr"] = Reference("mean image", mean_image)
    entropy = mean_over_codebooks(stage, "unigram_entropy")
    if entropy is not None:
        references |= dict.fromkeys(
            ("loss", "validation_loss"), Reference("unigram entropy", entropy)
        )
    return references


def mean_over_codebooks(stage: StageSummary, name: str) -> float | None:
    """Return a metric, or the mean over codebooks where it is given for each."""
    value = stage.number(name)
    group = stage.group(name)
    if value is None and group:
        return sum(group.values()) / len(group)
    return value
