"""Waits are shown as long as they last, the one that says most first."""

from __future__ import annotations

import os

import pytest

from fqgan_dist import waiting
from fqgan_dist.errors import (
    TRY_AGAIN,
    CheckpointError,
    DataError,
    LossError,
    NoCapacityError,
    StorageOutageError,
    exit_code_of,
)
from fqgan_dist.waiting import (
    STORAGE_VARIABLE,
    PatienceConfig,
    Waits,
    is_part_of_run,
    patient,
    storage_patience_s,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(waiting.time, "time", lambda: now[0])
    return now


def test_the_longest_wait_is_shown_once_it_is_worth_a_word(clock: list[float]) -> None:
    waits = Waits()
    storage = waits.begin("storage: 503")
    clock[0] += 4
    assert waits.longest() is None
    clock[0] += 6
    other = waits.begin("a disk")
    waits.change(storage, "storage: 500")
    clock[0] += 10
    wait = waits.longest()
    assert wait is not None
    assert (wait.what, wait.seconds) == ("storage: 500", 20.0)
    assert str(wait).endswith(" (20 s) for storage: 500")
    waits.end(storage)
    wait = waits.longest()
    assert wait is not None
    assert (wait.what, wait.seconds) == ("a disk", 10.0)
    waits.end(other)
    assert waits.longest() is None


def test_a_cause_is_shown_before_its_symptom(clock: list[float]) -> None:
    waits = Waits()
    with waits.during("batches", is_symptom=True):
        clock[0] += 10
        with waits.during("storage"):
            clock[0] += 10
            wait = waits.longest()
            assert wait is not None
            assert wait.what == "storage"
        wait = waits.longest()
        assert wait is not None
        assert wait.what == "batches"
    assert waits.longest() is None


def test_patience_is_a_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    assert not is_part_of_run()
    with patient(PatienceConfig(storage_s=7.0)):
        assert is_part_of_run()
        assert storage_patience_s() == 7.0
        with patient(PatienceConfig(storage_s=8.0)):
            assert storage_patience_s() == 8.0
        assert storage_patience_s() == 7.0
    assert STORAGE_VARIABLE not in os.environ


def test_what_is_passing_has_an_exit_code_of_its_own() -> None:
    for kind in (StorageOutageError, NoCapacityError, LossError):
        assert exit_code_of(kind("x")) == TRY_AGAIN == 75
    for kind in (DataError, CheckpointError):
        assert exit_code_of(kind("x")) == 1
