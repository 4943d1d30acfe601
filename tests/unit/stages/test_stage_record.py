from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.stages.stage_record import (
    DamagedRecordError,
    StageRecord,
    check_inputs,
    flatten,
    has_inputs,
    load_record,
    record_path,
    save_record,
    set_aside_damaged_records,
)
from fqgan_dist.storage.storage import Storage

SETTINGS = {"model": {"width": 8, "levels": (1, 2)}, "lr": 0.1, "adapter": None}
UPSTREAM = {"shards": {"train": "abc"}}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


PATH = record_path("codes")


def inputs(settings: dict[str, Any] = SETTINGS, upstream: dict[str, Any] = UPSTREAM) -> Any:
    return flatten({"settings": settings, "upstream": upstream})


def save(storage: Storage, **changes: Any) -> StageRecord:
    values: dict[str, Any] = {"stage": "codes", "state": "done", "inputs": inputs()}
    record = StageRecord.model_validate(values | changes)
    save_record(storage, PATH, record)
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
    assert load_record(storage, PATH) is None


def test_a_record_comes_back_as_it_was(storage: Storage) -> None:
    record = save(storage, metrics={"codes/crops": 0.1 + 0.2}, outputs={"train": "x"}, seconds=1.5)
    loaded = load_record(storage, PATH)
    assert loaded is not None
    assert loaded.metrics == record.metrics
    assert loaded.model_dump(mode="json") == record.model_dump(mode="json")


def check(storage: Storage, values: Any, **options: Any) -> StageRecord:
    record = load_record(storage, PATH)
    assert record is not None
    return check_inputs(record, values, source=storage.uri(PATH), **options)


def test_a_record_of_the_same_inputs_is_accepted(storage: Storage) -> None:
    save(storage, state="started")
    assert check(storage, inputs()).state == "started"


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
        check(storage, inputs(settings))
    assert "stage 'codes' was made from other inputs" in str(caught.value)
    assert "Use another storage.root, or the former settings" in str(caught.value)


def test_every_change_is_named(storage: Storage) -> None:
    save(storage)
    changed = inputs(SETTINGS | {"lr": 0.2}, {"shards": {"train": "xyz"}})
    with pytest.raises(DataError) as caught:
        check(storage, changed)
    assert "settings.lr: was 0.1, now 0.2" in str(caught.value)
    assert "upstream.shards.train: was 'abc', now 'xyz'" in str(caught.value)
    assert "width" not in str(caught.value)


def test_groups_that_are_not_known_yet_are_not_compared(storage: Storage) -> None:
    # Settings are compared before any stage runs, when nothing upstream may exist.
    save(storage)
    assert check(storage, flatten({"settings": SETTINGS})).state == "done"
    with pytest.raises(DataError, match=r"settings\.lr"):
        check(storage, flatten({"settings": SETTINGS | {"lr": 1.0}}))


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"stage": "codes"}', b'{"state": "gone"}'])
def test_a_damaged_record_is_named(storage: Storage, data: bytes) -> None:
    storage.write_bytes("manifests/codes.json", data)
    with pytest.raises(DataError, match=r"manifests/codes\.json: not a stage record"):
        load_record(storage, PATH)


def test_a_number_that_may_grow_continues_the_stage_and_is_remembered(storage: Storage) -> None:
    save(storage, inputs=inputs({"steps": 6, "lr": 0.1}))
    growing = {"settings.steps"}
    grown = check(storage, inputs({"steps": 8, "lr": 0.1}), growing=growing)
    assert grown.state == "started"
    assert grown.history == {"settings.steps": [6]}
    save_record(storage, PATH, grown.model_copy(update={"inputs": inputs({"steps": 8, "lr": 0.1})}))
    again = check(storage, inputs({"steps": 9, "lr": 0.1}), growing=growing)
    assert again.history == {"settings.steps": [6, 8]}


@pytest.mark.parametrize("settings", [{"steps": 5, "lr": 0.1}, {"steps": 8, "lr": 0.2}])
def test_a_number_that_shrinks_or_another_change_is_refused(
    storage: Storage, settings: dict[str, Any]
) -> None:
    save(storage, inputs=inputs({"steps": 6, "lr": 0.1}))
    with pytest.raises(DataError, match="was made from other inputs"):
        check(storage, inputs(settings), growing={"settings.steps"})
    with pytest.raises(DataError, match=r"settings\.steps: was 6, now 8"):
        check(storage, inputs({"steps": 8, "lr": 0.1}))  # not one that may grow


def test_inputs_are_compared_as_they_are_stored_less_exports_of_former_versions(
    storage: Storage,
) -> None:
    save(storage, inputs=inputs() | {"upstream.exports.npz": True})
    record = load_record(storage, PATH)
    assert record is not None
    assert has_inputs(record, inputs())
    assert not has_inputs(record, inputs(SETTINGS | {"lr": 0.2}))
    assert not has_inputs(record, inputs() | {"upstream.more": 1})


@pytest.mark.parametrize("former", ["6", None, [6], {"a": 6}, True])
def test_what_is_no_number_has_not_grown(storage: Storage, former: Any) -> None:
    record = save(storage, inputs={"training.steps": former})
    with pytest.raises(DataError, match=r"training\.steps: was .*, now 8"):
        check_inputs(record, {"training.steps": 8}, source="a", growing=["training.steps"])


def test_of_two_attempts_the_first_that_is_done_counts(storage: Storage) -> None:
    save(storage, state="started")
    first = save(storage, seconds=1.0)
    save(storage, state="started")
    save(storage, seconds=2.0)
    assert load_record(storage, PATH) == first.model_copy(
        update={"inputs": {**first.inputs, "settings.model.levels": [1, 2]}}
    )


def test_one_of_other_inputs_does_not_end_what_another_has_begun(storage: Storage) -> None:
    save(storage, state="started", inputs=inputs({"steps": 8}))
    with pytest.raises(DataError, match="begun stage 'codes' with other inputs"):
        save(storage, inputs=inputs({"steps": 4}))
    assert load_record(storage, PATH).inputs == {  # pyright: ignore[reportOptionalMemberAccess]
        "settings.steps": 8,
        "upstream.shards.train": "abc",
    }


def test_damaged_records_are_set_aside_and_no_others(storage: Storage, tmp_path: Path) -> None:
    save(storage)
    good = storage.read_bytes(PATH)
    damaged = {record_path("toy"): b'{"stage": 3}', record_path("toy", "a" * 64): b"\0"}
    for path, data in damaged.items():
        storage.write_bytes(path, data)
        with pytest.raises(DamagedRecordError, match="not a stage record"):
            load_record(storage, path)
    for _ in range(2):  # the second time there is nothing to do
        set_aside_damaged_records(storage)
        assert storage.read_bytes(PATH) == good
        assert [load_record(storage, path) for path in damaged] == [None, None]
        aside = {path.read_bytes() for path in tmp_path.rglob("*.json.damaged-*")}
        assert aside == set(damaged.values())
