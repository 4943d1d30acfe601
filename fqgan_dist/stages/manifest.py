"""The record of a stage: what it was made from, and, written last, what it made.

A stage whose record is done for the same inputs is skipped; for other inputs it refuses and says
which changed. So submitting the same job again is how a run resumes (design.md section 1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from fqgan_dist.config import Config
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage


class StageRecord(Config):
    """State, inputs and results of one stage of a run."""

    stage: str
    """Name of the stage."""
    state: Literal["started", "done"]
    """`done` only when every output is in storage."""
    inputs: dict[str, Any]
    """Settings and ids of upstream outputs, flattened to dotted names."""
    outputs: dict[str, Any] = Field(default_factory=dict)
    """Ids and places of what the stage made."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Results for the summary; equal to the bit for equal inputs."""
    seconds: float = 0.0
    """Wall time of the session that finished the stage."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def load_record(storage: Storage, stage: str) -> StageRecord | None:
    """Read a stage's record, None if the stage never started.

    Raises:
        DataError: the record is damaged.
    """
    path = _path(stage)
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        return StageRecord.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{storage.uri(path)}: not a stage record: {error}") from error


def save_record(storage: Storage, record: StageRecord) -> None:
    """Replace a stage's record."""
    text = json.dumps(record.model_dump(mode="json"), indent=1)
    storage.write_bytes(_path(record.stage), text.encode())


def check_inputs(storage: Storage, stage: str, inputs: Mapping[str, Any]) -> StageRecord | None:
    """Compare inputs with those of the stage's record.

    Args:
        storage: root of the run.
        stage: name of the stage.
        inputs: flattened; groups (first part of the name) that are absent here are not compared.

    Returns:
        The record, or None if the stage never started. An upstream input that was absent (null) and
        is there now extends the stage: the record is returned as not done.

    Raises:
        DataError: an input changed; every change is listed.
    """
    record = load_record(storage, stage)
    if record is None:
        return None
    current = json.loads(json.dumps(dict(inputs)))
    added = [
        name
        for name, value in current.items()
        if name.startswith("upstream.") and value is not None and record.inputs.get(name) is None
    ]
    if added:
        record = record.model_copy(update={"state": "started"})
        current = {name: value for name, value in current.items() if name not in added}
    changes = [
        f"{name}: was {record.inputs[name]!r}, now {value!r}"
        for name, value in current.items()
        if name in record.inputs and record.inputs[name] != value
    ]
    changes += [f"{name}: new, now {current[name]!r}" for name in current.keys() - record.inputs]
    groups = {name.split(".")[0] for name in current}
    changes += [
        f"{name}: was {record.inputs[name]!r}, now absent"
        for name in record.inputs.keys() - current.keys() - set(added)
        if name.split(".")[0] in groups
    ]
    if changes:
        raise DataError(
            f"{storage.uri(_path(stage))}: stage {stage!r} was made from other inputs:\n  "
            + "\n  ".join(sorted(changes))
            + "\nUse another storage.root, or the former settings"
        )
    return record


def _path(stage: str) -> str:
    return f"manifests/{stage}.json"
