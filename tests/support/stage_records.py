"""Stages that count as finished although nothing has run."""

from __future__ import annotations

from typing import Any, Literal

from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages.stage import RunContext, find_stage
from fqgan_dist.stages.stage_record import StageRecord, record_path

DATASETS = {"train": "d", "val": "v"}
WEIGHTS = {"step": 1, "weights": "t"}


def save_stage(
    context: RunContext,
    name: str,
    outputs: dict[str, Any],
    *,
    state: Literal["started", "done"] = "done",
    **results: Any,
) -> StageRecord:
    """Write the record that a stage would leave, made from the settings of the run."""
    stage = find_stage(name)(context)
    is_one_of_many = stage.records == "one_per_inputs"
    inputs = stage.collect_inputs() if is_one_of_many else {}
    record = StageRecord(stage=name, state=state, inputs=inputs, outputs=outputs, **results)
    # Not as a stage does it, which leaves what another attempt has done.
    context.storage.delete(record_path(name, fingerprint(inputs) if is_one_of_many else None))
    stage.save_record(record)
    return record
