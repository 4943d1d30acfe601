"""What the progress board finds of heartbeats, and what the driver makes of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import pytest
from support.waiting import wait_until

from fqgan_dist.activity import Glance, WatchdogConfig
from fqgan_dist.orchestration import heartbeats
from fqgan_dist.orchestration.heartbeats import StandstillBoard, StandstillWatch
from fqgan_dist.stopped_processes import ProcessId
from fqgan_dist.telemetry.standstill import Heartbeat, Member, Standstill

GLANCE = Glance(phase="step 7", pace="steady", is_loading=False, still_s=0, median_s=1, waiting="")
CONFIG = WatchdogConfig(after_s=100, warn_after_s=30)


def beat(number: int, *, world_size: int = 2, still_s: float = 0) -> Heartbeat:
    member = Member(
        group="tokenizer 1",
        number=number,
        name=f"rank {number}",
        world_size=world_size,
        process=ProcessId(host="host", pid=7, started=1, stacks_fd=3, node="node"),
    )
    return member.heartbeat(replace(GLANCE, still_s=still_s), CONFIG)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_board_tells_every_rank_that_they_hang_until_it_forgets_them() -> None:
    clock = Clock()
    board = StandstillBoard(clock=clock)
    assert board.beat(beat(0)) is None
    clock.now += 1
    assert board.beat(beat(1)) is None
    clock.now += 1
    board.beat(beat(0, still_s=200))
    clock.now += 1
    answers = [board.beat(beat(1, still_s=200)), board.beat(beat(0, still_s=200))]
    assert [answer is not None and answer.is_hang for answer in answers] == [True, True]
    assert list(board.standstills()) == ["tokenizer 1"]
    board.forget("tokenizer 1")
    assert board.standstills() == {}


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Heartbeat]:
    """Those that were to be ended."""
    found: list[Heartbeat] = []
    monkeypatch.setattr(heartbeats, "_end_on_nodes", found.extend)
    return found


def standstill(seconds: float, *, silent: tuple[Heartbeat, ...] = ()) -> Standstill:
    return Standstill(
        seconds=seconds,
        places="rank 0: step 7",
        culprit="rank 1 is it",
        is_hang=seconds >= 100,
        silent=silent,
    )


def test_the_driver_says_what_stands_still_and_ends_who_is_silent_once(
    ended: list[Heartbeat], caplog: pytest.LogCaptureFixture
) -> None:
    watch = StandstillWatch()
    silent = (beat(1),)
    with caplog.at_level(logging.WARNING):
        for seconds in (30, 31, 61, 122, 123):
            shown = watch.look({"tokenizer 1": [standstill(seconds, silent=silent)]})
    assert shown["tokenizer"].startswith("nothing moves since 2 min 03 s")
    assert [record.getMessage().partition(" since")[0] for record in caplog.records] == [
        "tokenizer: nothing moves",
        "tokenizer: nothing moves",
        "tokenizer: hangs: nothing moves",
    ]
    wait_until(lambda: ended == list(silent))
    assert watch.look({}) == {}


def test_of_an_actor_that_its_pool_has_ended_nothing_is_said(
    ended: list[Heartbeat], caplog: pytest.LogCaptureFixture
) -> None:
    silent = (beat(1, world_size=0),)
    with caplog.at_level(logging.WARNING):
        assert StandstillWatch().look({"codes 1": [standstill(200, silent=silent)]}) == {}
    assert not caplog.records
    wait_until(lambda: ended == list(silent))  # whose end finds nobody, then
