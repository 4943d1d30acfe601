"""The parts of a restart: as many as are known, none of them negative."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.sessions import resumed_at

from fqgan_dist import recovery
from fqgan_dist.recovery import DriverTimes, Recovery
from fqgan_dist.training import hooks
from fqgan_dist.training.hooks import TellRecovery

TIMES = DriverTimes(ended_at=10.0, detected_at=12.0, asked_at=12.5, capacity_s=7.5)


def begin(monkeypatch: pytest.MonkeyPatch, times: DriverTimes | None, *, at: float) -> Recovery:
    monkeypatch.setattr(recovery, "time", SimpleNamespace(time=lambda: at))
    began = Recovery()
    began.begin(lambda: times)
    return began


def test_each_part_lasts_from_the_moment_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = begin(monkeypatch, TIMES, at=24.0).parts(restored_at=27.0, stepped_at=28.0)
    assert parts == {
        "detection": 2.0,
        "pause": 0.5,
        "capacity": 7.5,
        "group_start": 4.0,
        "restore": 3.0,
        "first_step": 1.0,
    }
    assert next(iter(parts)) == "detection"
    assert sum(parts.values()) == 28.0 - 10.0


def test_what_nobody_saw_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = begin(monkeypatch, DriverTimes(detected_at=1.0), at=24.0).parts(
        restored_at=27.0, stepped_at=28.0
    )
    assert set(parts) == {"restore", "first_step"}


def test_clocks_that_differ_make_no_time_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = begin(monkeypatch, TIMES, at=19.0).parts(restored_at=27.0, stepped_at=28.0)
    assert parts["group_start"] == 0.0


def test_times_survive_the_way_to_the_rank() -> None:
    assert DriverTimes.from_json(json.loads(json.dumps(TIMES.to_json()))) == TIMES


def test_every_start_by_a_driver_records_its_size(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for times in (DriverTimes(num_workers=3), replace(TIMES, num_workers=3)):
        hook = TellRecovery(begin(monkeypatch, times, at=24.0), stage="tokenizer")
        with caplog.at_level(logging.INFO):
            hook.start(resumed_at(0))
            hook.step(1)
        assert hook.measure(1.0)["train/num_workers"] == 3.0
        assert "train/num_workers" not in hook.measure(1.0)
    (record,) = caplog.records
    assert "back at step 1 with 3 train worker(s) after " in record.getMessage()


@pytest.mark.parametrize("is_restart", [True, False])
@pytest.mark.parametrize("first_step", [0, 7])
def test_a_restart_says_its_parts_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    first_step: int,
    is_restart: bool,
) -> None:
    began = begin(monkeypatch, TIMES if is_restart else None, at=24.0)
    ticks = itertools.count(27.0)
    monkeypatch.setattr(hooks, "time", SimpleNamespace(time=lambda: next(ticks)))
    hook = TellRecovery(began, stage="tokenizer")
    with caplog.at_level(logging.INFO):
        hook.start(resumed_at(first_step))
        for step in range(first_step + 1, first_step + 4):
            hook.step(step)
    measured = [hook.measure(1.0), hook.measure(1.0)]
    if first_step or is_restart:
        (record,) = caplog.records
        assert f"back at step {first_step + 1} " in record.getMessage()
        assert "restore 3.0 s, first step 1.0 s" in record.getMessage()
        assert ("detection 2.0 s" in record.getMessage()) == is_restart
        assert measured[0]["train/recovery_restore_s"] == 3.0
    else:
        assert not caplog.records
        assert not measured[0]
    assert not measured[1]
