"""The summary of a run, collected from its stages' records."""

from __future__ import annotations

from typing import Any

from fqgan_dist.stages.stage import RunContext, build_stages
from fqgan_dist.stages.stage_record import StageRecord

Summary = dict[str, dict[str, Any]]
"""Stage -> {state, seconds, metrics}, the content of `summary.json`; `others` lists the records of
a stage that the run has beside that of the config at hand, each with the inputs that differ."""


def load_summary(context: RunContext) -> Summary:
    """Collect the summary of the config at hand.

    A stage may report on another (`<stage>/<metric>`): evaluation's results stand under the stage
    that they judge.
    """
    summary: Summary = {}
    metrics: dict[str, Any] = {}
    for stage in build_stages(context):
        record = stage.find_record()
        others = stage.list_other_records()
        if record is None and not others:
            continue
        summary[stage.name] = {
            "state": record.state if record else "not started",
            "seconds": record.seconds if record else 0.0,
            "metrics": {},
        }
        if stage.name in context.config.upstream:
            summary[stage.name]["taken_from"] = context.config.upstream[stage.name]
        if others:
            summary[stage.name]["others"] = [_describe_other(each, record) for each in others]
        metrics |= record.metrics if record else {}
    for name, value in metrics.items():
        stage_name, _, metric = name.partition("/")
        if stage_name in summary:
            summary[stage_name]["metrics"][metric] = value
    return summary


def _describe_other(other: StageRecord, present: StageRecord | None) -> dict[str, Any]:
    known = present.inputs if present else {}
    return {
        "state": other.state,
        "inputs": {
            name: value
            for name, value in other.inputs.items()
            if name not in known or known[name] != value
        },
        "metrics": other.metrics,
    }
