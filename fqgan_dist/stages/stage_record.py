"""The record of a stage: what it was made from, and, written last, what it made.

    manifests/<stage>.json                   of a stage with one record per run
    manifests/<stage>/<fingerprint>.json     of a stage with one for each set of inputs

A stage whose record is done for the same inputs is skipped; so submitting the same job again is how
a run resumes (design.md section 1).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeGuard

from pydantic import Field, ValidationError

from fqgan_dist.config import Config
from fqgan_dist.errors import DataError
from fqgan_dist.storage.derived import read_if_there, try_replace
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage

logger = logging.getLogger(__name__)

FOLDER = "manifests"
_SUFFIX = ".json"

# Records of runs that were begun before exports were a stage name them here.
_FORMER_INPUTS = "upstream.exports."


class DamagedRecordError(DataError):
    """What is where a record should be is none."""


class StageRecord(Config):
    """State, inputs and results of one stage of a run."""

    stage: str
    state: Literal["started", "done"]
    """`done` only when every output is in storage."""
    inputs: dict[str, Any]
    """Settings and ids of upstream outputs, flattened to dotted names."""
    outputs: dict[str, Any] = Field(default_factory=dict)
    """Ids and folders of what the stage made."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Results for the summary; equal to the bit for equal inputs."""
    seconds: float = 0.0
    """Wall time of the session that finished the stage."""
    history: dict[str, list[Any]] = Field(default_factory=dict)
    """Former values, oldest first, of inputs that have grown since the stage was first made."""

    @property
    def is_done(self) -> bool:
        return self.state == "done"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def record_path(stage: str, fingerprint: str | None = None) -> str:
    """Name a record; one of several of its stage by the fingerprint of its inputs."""
    return (
        f"{FOLDER}/{stage}.json" if fingerprint is None else f"{FOLDER}/{stage}/{fingerprint}.json"
    )


def load_record(storage: Storage, path: str) -> StageRecord | None:
    """Read a record, None if there is none.

    Raises:
        DamagedRecordError: the record is damaged.
    """
    try:
        data = read_document(storage, path)
    except FileNotFoundError:
        return None
    return _parse(data, storage.uri(path))


def set_aside_damaged_records(storage: Storage) -> None:
    """Move the records of a run that are none out of the way, where somebody can look at them.

    What lies beside the results never stops a run: their stages find what they have made.
    """
    for path in _list_records(storage):
        try:
            load_record(storage, path)
        except DamagedRecordError as error:
            logger.warning("%s; it is set aside as %s", error, _set_aside(storage, path))


def _list_records(storage: Storage) -> Iterator[str]:
    for name in storage.list(FOLDER):
        if name.endswith(_SUFFIX):
            yield f"{FOLDER}/{name}"
        elif "." not in name:
            names = storage.list(f"{FOLDER}/{name}")
            yield from (f"{FOLDER}/{name}/{each}" for each in names if each.endswith(_SUFFIX))


def _set_aside(storage: Storage, path: str) -> str:
    data = storage.read_bytes(path)
    # Named by its bytes, so that several who find it do the same.
    aside = f"{path}.damaged-{hashlib.sha256(data).hexdigest()[:12]}"
    storage.write_bytes(aside, data)
    storage.delete(path)
    return storage.uri(aside)


def save_record(storage: Storage, path: str, record: StageRecord) -> None:
    """Write a record, unless another attempt at the stage has gone further in the meantime.

    Of attempts at once the first that is done counts: equal inputs have equal outputs. One that
    was believed dead so changes nothing that its successor wrote.

    Raises:
        DataError: another attempt has begun the stage with other inputs.
    """
    data = json.dumps(record.model_dump(mode="json"), indent=1).encode()
    where, inputs = storage.uri(path), _as_stored(record.inputs)
    while True:
        former_data = read_if_there(storage, path)
        former = _parse(former_data, where) if former_data is not None else None
        if former is not None and former.inputs == inputs and former.is_done:
            if record.is_done and former.outputs != record.outputs:
                logger.info("%s: another attempt was done first; its record stays", where)
            return
        if former is not None and former.inputs != inputs and record.is_done:
            raise DataError(
                f"{where}: another attempt has begun stage {record.stage!r} with other inputs; "
                "this one must stop"
            )
        if try_replace(storage, path, data, former=former_data):
            return


def _parse(data: bytes, where: str) -> StageRecord:
    try:
        return StageRecord.model_validate_json(data)
    except ValidationError as error:
        raise DamagedRecordError(f"{where}: not a stage record: {error}") from error


def has_inputs(record: StageRecord, inputs: Mapping[str, Any]) -> bool:
    """Whether a record was made from these inputs, flattened."""
    known = {
        name: value for name, value in record.inputs.items() if not name.startswith(_FORMER_INPUTS)
    }
    return known == _as_stored(inputs)


def check_inputs(
    record: StageRecord,
    inputs: Mapping[str, Any],
    *,
    source: str,
    growing: Collection[str] = (),
) -> StageRecord:
    """Compare inputs with those of a record; return it.

    Groups (the first part of a name) that are absent in `inputs` are not compared. Numbers that are
    named as `growing`, such as the steps of a training, may be larger than they were: the record
    that is returned is then not done, and its history has the former one.

    Raises:
        DataError: an input changed; every change is listed, after `source`.
    """
    current = _as_stored(inputs)
    grown = {
        name
        for name in growing
        if _is_number(was := record.inputs.get(name))
        and _is_number(now := current.get(name))
        and now > was
    }
    groups = {name.split(".")[0] for name in current}
    former = {name: value for name, value in record.inputs.items() if name.split(".")[0] in groups}
    changes = [
        _describe_change(name, former, current)
        for name in sorted(former.keys() | current.keys())
        if name not in grown and not _is_equal(name, former, current)
    ]
    if changes:
        raise DataError(
            f"{source}: stage {record.stage!r} was made from other inputs:\n  "
            + "\n  ".join(changes)
            + "\nUse another storage.root, or the former settings"
        )
    if not grown:
        return record
    history = {name: [*record.history.get(name, []), record.inputs[name]] for name in sorted(grown)}
    return record.model_copy(update={"state": "started", "history": record.history | history})


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_equal(name: str, former: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    return name in former and name in current and former[name] == current[name]


def _describe_change(name: str, former: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    if name not in former:
        return f"{name}: new, now {current[name]!r}"
    now = repr(current[name]) if name in current else "absent"
    return f"{name}: was {former[name]!r}, now {now}"


def _as_stored(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(inputs)))
