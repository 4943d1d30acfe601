"""When processes stand still, when they hang, and who is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support.clocks import Clock

from fqgan_dist.activity import Glance, WatchdogConfig
from fqgan_dist.stopped_processes import ProcessId
from fqgan_dist.telemetry.standstill import (
    Heartbeat,
    HeartbeatTable,
    Member,
    find_bounds,
    judge_together,
)

CONFIG = WatchdogConfig(after_s=100, slow_after_s=800, warn_after_s=30)
PROCESS = ProcessId(host="host", pid=7, started=1, stacks_fd=3)


def glance(**values: object) -> Glance:
    usual: dict[str, object] = {
        "phase": "step 7",
        "pace": "steady",
        "is_loading": False,
        "still_s": 0.0,
        "median_s": 1.0,
        "waiting": "",
    }
    return Glance(**(usual | values))  # pyright: ignore[reportArgumentType]


def beat(
    number: int, *, world_size: int = 2, num_collectives: int | None = None, **values: object
) -> Heartbeat:
    member = Member(
        group="a", number=number, name=f"rank {number}", world_size=world_size, process=PROCESS
    )
    return member.heartbeat(glance(**values), CONFIG, num_collectives=num_collectives)


def test_a_heartbeat_survives_json() -> None:
    heartbeat = beat(1, num_collectives=3)
    assert Heartbeat.of_json(json.loads(json.dumps(heartbeat.to_json()))) == heartbeat


@pytest.mark.parametrize(
    ("pace", "median_s", "bounds"),
    [
        ("steady", 1.0, (100, 30)),
        ("steady", 6.0, (120, 30)),
        ("steady", 20.0, (400, 60)),
        ("slow", None, (800, 30)),
        ("slow", 20.0, (800, 30)),
    ],
)
def test_the_bound_is_the_larger_of_the_setting_and_twenty_times_the_median(
    pace: str, median_s: float | None, bounds: tuple[float, float]
) -> None:
    assert find_bounds(glance(pace=pace, median_s=median_s), CONFIG) == bounds


def test_ranks_of_which_one_moves_do_not_stand_still() -> None:
    assert judge_together([(beat(0, still_s=500), 0), (beat(1, still_s=29), 0)]) is None


def test_what_stands_still_is_said_before_it_hangs() -> None:
    seen = [(beat(0, still_s=40), 0.5), (beat(1, still_s=35), 0.5)]
    standstill = judge_together(seen)
    assert standstill is not None
    assert not standstill.is_hang
    assert standstill.text == "nothing moves since 35.5 s: no rank stands out; rank 0, 1: step 7"


@pytest.mark.parametrize("still_s", [99.0, 100.0])
def test_ranks_hang_when_the_bound_of_each_has_passed(still_s: float) -> None:
    standstill = judge_together([(beat(0, still_s=300), 0), (beat(1, still_s=still_s), 0)])
    assert standstill is not None
    assert standstill.is_hang is (still_s == 100)


def test_a_rank_whose_pace_is_unknown_has_longer() -> None:
    seen = [(beat(0, still_s=300), 0.0), (beat(1, still_s=300, pace="slow"), 0.0)]
    standstill = judge_together(seen)
    assert standstill is not None
    assert not standstill.is_hang


@pytest.mark.parametrize("waiting", [{"waiting": "object storage"}, {"pace": "idle"}])
def test_nobody_hangs_while_a_rank_knows_what_it_waits_for(waiting: dict[str, Any]) -> None:
    assert judge_together([(beat(0, still_s=900), 0), (beat(1, still_s=900, **waiting), 0)]) is None


def test_the_silent_rank_is_the_culprit_whatever_the_others_do() -> None:
    seen = [(beat(0, still_s=100, pace="slow", is_loading=True), 0.5), (beat(1), 100)]
    standstill = judge_together(seen)
    assert standstill is not None
    assert standstill.is_hang
    assert standstill.culprit.startswith("rank 1 gives no sign of life")
    assert standstill.places.endswith("rank 1: last heard in step 7")
    assert [each.number for each in standstill.silent] == [1]


def test_a_silent_rank_is_none_while_another_moves() -> None:
    assert judge_together([(beat(0), 0.5), (beat(1), 500)]) is None


def test_a_wait_that_was_last_heard_of_before_silence_counts_no_more() -> None:
    seen = [(beat(0, still_s=100), 0), (beat(1, waiting="object storage"), 120)]
    standstill = judge_together(seen)
    assert standstill is not None
    assert standstill.is_hang


@pytest.mark.parametrize(
    ("first", "second", "culprit"),
    [
        ({}, {"is_loading": True}, "the loader of rank 1 gives no batch"),
        ({"is_loading": True}, {"is_loading": True}, "the loader of rank 0, 1 gives no batch"),
        (
            {"num_collectives": 5},
            {"num_collectives": 4},
            "rank 1 has not entered the collective that the others wait in",
        ),
        ({"num_collectives": 5}, {"num_collectives": 5}, "no rank stands out"),
        ({"num_collectives": 5}, {"num_collectives": None}, "no rank stands out"),
    ],
)
def test_the_culprit_is_the_rank_that_the_others_wait_for(
    first: dict[str, Any], second: dict[str, Any], culprit: str
) -> None:
    seen = [(beat(0, still_s=200, **first), 0.0), (beat(1, still_s=200, **second), 0.0)]
    standstill = judge_together(seen)
    assert standstill is not None
    assert standstill.culprit == culprit


def test_a_rank_that_was_never_heard_of_is_the_culprit_unless_it_has_left() -> None:
    seen = [(beat(0, still_s=200), 0.0)]
    standstill = judge_together(seen)
    assert standstill is not None
    assert standstill.culprit == "rank 1 of 2 was never heard of"
    standstill = judge_together(seen, has_left={1})
    assert standstill is not None
    assert standstill.culprit == "rank 0 stands still by itself"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> HeartbeatTable:
    return HeartbeatTable(clock=clock)


def tick(table: HeartbeatTable, clock: Clock, seconds: float, *beats: Heartbeat) -> None:
    """Let time pass in which some are heard."""
    for _ in range(round(seconds)):
        clock.now += 1
        for each in beats:
            table.receive(each)
        table.judge_all()


def test_the_table_finds_who_is_heard_no_more(table: HeartbeatTable, clock: Clock) -> None:
    for number in (0, 1):
        table.receive(beat(number))
    tick(table, clock, 99, beat(0, still_s=100))
    standstill = table.judge("a")
    assert standstill is not None
    assert not standstill.is_hang
    tick(table, clock, 1, beat(0, still_s=100))
    (standstill,) = table.judge_all()["a"]
    assert standstill.is_hang
    # All of the group are told, however they go on.
    table.receive(beat(1))
    assert table.judge("a") == standstill
    table.forget("a")
    assert table.judge_all() == {}


def test_nobody_was_silent_while_the_listener_itself_was_stopped(
    table: HeartbeatTable, clock: Clock
) -> None:
    for number in (0, 1):
        table.receive(beat(number))
    clock.now += 500
    assert table.judge("a") is None


def test_who_leaves_is_not_missed(table: HeartbeatTable, clock: Clock) -> None:
    for number in (0, 1):
        table.receive(beat(number))
    for number in (0, 1):
        table.receive(replace(beat(number), is_last=True))
        table.receive(beat(number))  # late
    tick(table, clock, 500)
    assert table.judge_all() == {}


def test_actors_are_judged_one_by_one(table: HeartbeatTable, clock: Clock) -> None:
    actors = [beat(number, world_size=0, pace="idle") for number in (0, 1)]
    for actor in actors:
        table.receive(actor)
    tick(table, clock, 99, actors[0])
    clock.now += 1
    assert table.judge("a", 0) is None
    (standstill,) = table.judge_all()["a"]
    assert [each.number for each in standstill.silent] == [1]
    assert table.judge_all() == {}, "who hangs is told of once"
