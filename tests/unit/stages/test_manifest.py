from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.stages.manifest import (
    StageRecord,
    check_inputs,
    flatten,
    load_record,
    save_record,
)
from fqgan_dist.storage.storage import Storage

SETTINGS = {"model": {"width": 8, "levels": (1, 2)}, "lr": 0.1, "adapter": None}
UPSTREAM = {"shards": {"train": "abc"}}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def inputs(settings: dict[str, Any] = SETTINGS, upstream: dict[str, Any] = UPSTREAM) -> Any:
    return flatten({"settings": settings, "upstream": upstream})


def save(storage: Storage, **changes: Any) -> StageRecord:
    values: dict[str, Any] = {"stage": "codes", "state": "done", "inputs": inputs()}
    record = StageRecord.model_validate(values | changes)
    save_record(storage, record)
    return record


def test_nested_settings_become_dotted_names() -> None:
    assert inputs() == {
        "settings.model.width": 8,
        "settings.model.levels": (1, 2),
        "settings.lr": 0.1,
        "settings.adapter": None,
        "upstream.shards.train": "abc",
    }


def test_a_stage_that_never_started_has_no_record(storage: Storage) -> None:
    assert load_record(storage, "codes") is None
    assert check_inputs(storage, "codes", inputs()) is None


def test_a_record_comes_back_as_it_was(storage: Storage) -> None:
    record = save(storage, metrics={"codes/crops": 0.1 + 0.2}, outputs={"train": "x"}, seconds=1.5)
    loaded = load_record(storage, "codes")
    assert loaded is not None
    assert loaded.metrics == record.metrics
    assert loaded.model_dump(mode="json") == record.model_dump(mode="json")


def test_a_record_of_the_same_inputs_is_accepted(storage: Storage) -> None:
    save(storage, state="started")
    record = check_inputs(storage, "codes", inputs())
    assert record is not None
    assert record.state == "started"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"lr": 0.2}, r"settings\.lr: was 0\.1, now 0\.2"),
        (
            SETTINGS | {"model": {"width": 8, "levels": (1, 3)}},
            r"settings\.model\.levels: was \[1, 2\], now \[1, 3\]",
        ),
        (SETTINGS | {"momentum": 0.9}, r"settings\.momentum: new, now 0\.9"),
        ({"lr": 0.1, "adapter": None}, r"settings\.model\.width: was 8, now absent"),
        (SETTINGS | {"adapter": {"depth": 2}}, r"settings\.adapter: was None, now absent"),
    ],
)
def test_a_changed_input_is_refused_and_named(
    storage: Storage, settings: dict[str, Any], message: str
) -> None:
    save(storage)
    with pytest.raises(DataError, match=message) as caught:
        check_inputs(storage, "codes", inputs(settings))
    assert "stage 'codes' was made from other inputs" in str(caught.value)
    assert "Use another storage.root, or the former settings" in str(caught.value)


def test_every_change_is_named(storage: Storage) -> None:
    save(storage)
    changed = inputs(SETTINGS | {"lr": 0.2}, {"shards": {"train": "xyz"}})
    with pytest.raises(DataError) as caught:
        check_inputs(storage, "codes", changed)
    assert "settings.lr: was 0.1, now 0.2" in str(caught.value)
    assert "upstream.shards.train: was 'abc', now 'xyz'" in str(caught.value)
    assert "width" not in str(caught.value)


def test_groups_that_are_not_known_yet_are_not_compared(storage: Storage) -> None:
    # Settings are compared before any stage runs, when nothing upstream may exist.
    save(storage)
    assert check_inputs(storage, "codes", flatten({"settings": SETTINGS})) is not None
    with pytest.raises(DataError, match=r"settings\.lr"):
        check_inputs(storage, "codes", flatten({"settings": SETTINGS | {"lr": 1.0}}))


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"stage": "codes"}', b'{"state": "gone"}'])
def test_a_damaged_record_is_named(storage: Storage, data: bytes) -> None:
    storage.write_bytes("manifests/codes.json", data)
    with pytest.raises(DataError, match=r"manifests/codes\.json: not a stage record"):
        check_inputs(storage, "codes", inputs())
