"""The thread that watches: what it says, and when it ends the attempt."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.waiting import wait_until

from fqgan_dist.activity import Activity, WatchdogConfig
from fqgan_dist.errors import TRY_AGAIN, HangError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.standstill import Heartbeat, Standstill
from fqgan_dist.telemetry.watchdog import GrowingInterval, Watchdog, WatchedProcess
from fqgan_dist.world import World

CONFIG = WatchdogConfig(after_s=0.3, slow_after_s=0.3, warn_after_s=0.1)


@pytest.fixture
def read_log(tmp_path: Path) -> Iterator[Callable[[], str]]:
    handlers = list(logging.getLogger().handlers)
    configure_logging(World(), open_log_file(Storage(tmp_path), "test"))
    (path,) = (tmp_path / "logs").iterdir()
    yield path.read_text
    for handler in list(logging.getLogger().handlers):
        if handler not in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def watch(activity: Activity, ends: list[HangError], **values: object) -> Watchdog:
    process = WatchedProcess(name="rank 0/1 node0", end=ends.append)
    return Watchdog(
        replace(process, **values),
        CONFIG,
        activity=activity,
        interval_s=0.01,
    )


def test_what_hangs_is_told_warned_of_and_ended_with_its_stacks(
    read_log: Callable[[], str],
) -> None:
    activity, ends = Activity(), list[HangError]()
    activity.enter("step 7", pace="steady")
    release = threading.Event()

    def wait_for_ever() -> None:
        release.wait()

    thread = threading.Thread(target=wait_for_ever, name="training")
    thread.start()
    with watch(activity, ends) as watchdog:
        wait_until(lambda: bool(ends))
    release.set()
    thread.join()
    (error,) = ends
    assert watchdog.hang is error
    assert "rank 0/1 node0 stands still by itself; rank 0: step 7" in str(error)
    warning, _, stacks = read_log().partition("HANGS")
    assert "nothing moves since" in warning
    assert "thread training:" in stacks
    assert "in wait_for_ever" in stacks


@pytest.mark.parametrize("ends", [True, False])
def test_who_does_not_leave_the_block_is_ended_and_who_left_it_is_not(ends: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LAST_RESORT, str(int(ends))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert done.returncode == (0 if ends else TRY_AGAIN)


_LAST_RESORT = """
import sys, time
from fqgan_dist.activity import Activity
from fqgan_dist.telemetry import watchdog
from unit.telemetry.test_watchdog import watch
watchdog._LAST_RESORT_S = 1.0
activity, ends = Activity(), []
activity.enter("step 7", pace="steady")
with watch(activity, ends):
    while not ends:
        time.sleep(0.01)
    if sys.argv[1] == "0":
        time.sleep(50)
time.sleep(2)
"""


def test_what_moves_or_rests_is_not_ended(read_log: Callable[[], str]) -> None:
    activity, ends = Activity(), list[HangError]()
    seen: list[Heartbeat] = []
    with watch(activity, ends, exchange=seen.append):
        wait_until(lambda: len(seen) > 40)
    assert not ends
    assert seen[-1].is_last
    assert "nothing moves" not in read_log()


def test_the_answer_of_who_knows_all_ranks_counts() -> None:
    activity, ends = Activity(), list[HangError]()
    found = Standstill(seconds=9, places="", culprit="rank 1 is it", is_hang=True)
    with watch(activity, ends, exchange=lambda _: found):
        wait_until(lambda: bool(ends))
    assert "rank 1 is it" in str(ends[0])


def test_where_nobody_answers_a_rank_judges_alone() -> None:
    activity, ends = Activity(), list[HangError]()
    activity.enter("step 7", pace="steady")
    release = threading.Event()

    def never_answer(_: Heartbeat) -> None:
        release.wait()

    with watch(activity, ends, exchange=never_answer, world_size=2):
        wait_until(lambda: bool(ends))
        release.set()
    assert "how the others are nobody tells" in str(ends[0])


def test_a_standstill_is_said_again_each_time_after_twice_as_long() -> None:
    interval = GrowingInterval()

    def said(seconds: float | None, *, is_hang: bool = False) -> bool:
        found = Standstill(seconds=seconds or 0, places="", culprit="", is_hang=is_hang)
        return interval.is_due(None if seconds is None else found)

    assert [said(each) for each in (None, 30, 31, 59, 60, 90, 120)] == [
        *(False, True, False, False, True, False, True)
    ]
    assert [said(each) for each in (None, 30)] == [False, True]
    assert [said(each, is_hang=True) for each in (40, 41)] == [True, False]
