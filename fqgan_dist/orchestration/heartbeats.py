"""Heartbeats on a Ray cluster: ranks and actors send them to the run's progress board.

The board judges; the driver says what it finds, and ends the processes that are stopped, by a task
on their node.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fqgan_dist.stopped_processes import ProcessId, end_process
from fqgan_dist.telemetry.standstill import Heartbeat, HeartbeatTable, Standstill
from fqgan_dist.telemetry.watchdog import GrowingInterval, report_end

_ANSWER_TIMEOUT_S = 5.0
_JUDGED_AGAIN_S = 0.5
# The others shall have said what hangs before the end of who is stopped is seen: they do within
# 3 s, and Ray Train looks every 2 s. It ends a stopped worker itself 10 s after that (5 s in its
# shutdown, 5 s in `ray.kill`, as measured), without its stacks.
_HEAD_START_S = 7.0
_END_TIMEOUT_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoardExchange:
    """How the processes of one attempt, or one pool, tell the board how they are."""

    board: Any
    """Ray's handle of the board's actor."""
    group: str
    """Unique."""

    @classmethod
    def of_stage(cls, board: Any, stage: str) -> BoardExchange:
        """Begin a new attempt or pool of a stage."""
        return cls(board, f"{stage} {uuid.uuid4().hex}")

    def __call__(self, heartbeat: Heartbeat) -> Standstill | None:
        """Send one, and get what is known of all; raises what Ray does."""
        return ray.get(self.board.beat.remote(heartbeat), timeout=_ANSWER_TIMEOUT_S)

    def close(self) -> None:
        """Let the board forget the group: its processes are gone."""
        try:
            self.board.forget.remote(self.group)
        except RayError as error:
            logger.debug("the progress board cannot be told: %s", error)


class StandstillBoard:
    """The board's part: who is heard of, judged now and then."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nobody heard of."""
        self._clock = clock
        self._table = HeartbeatTable(clock=clock)
        self._judged: dict[str, tuple[float, Standstill | None]] = {}

    def beat(self, heartbeat: Heartbeat) -> Standstill | None:
        """Take a heartbeat in, and tell its group's state: of many ranks not at each one's."""
        self._table.receive(heartbeat)
        name, now = heartbeat.group, self._clock()
        if heartbeat.world_size == 0:
            return self._table.judge(name, heartbeat.number)
        if name not in self._judged or now - self._judged[name][0] >= _JUDGED_AGAIN_S:
            self._judged[name] = now, self._table.judge(name)
        return self._judged[name][1]

    def forget(self, group: str) -> None:
        """Forget the group of an attempt that is over."""
        self._table.forget(group)
        self._judged.pop(group, None)

    def standstills(self) -> dict[str, list[Standstill]]:
        """Give those of now, by group."""
        return self._table.judge_all()


class StandstillWatch:
    """The driver's part: says what stands still, and ends what is stopped."""

    def __init__(self) -> None:
        """Begin with nothing said."""
        self._intervals: dict[str, GrowingInterval] = {}
        self._ended: set[tuple[str, int]] = set()

    def look(self, standstills: dict[str, list[Standstill]]) -> dict[str, str]:
        """Take the standstills of now; gives by stage what its table shows."""
        shown: dict[str, str] = {}
        for group, found in standstills.items():
            stage = group.partition(" ")[0]
            for standstill in found:
                self._end_silent(group, standstill)
            # An actor that is silent may have been ended by its pool.
            told = [each for each in found if all(beat.world_size for beat in each.silent)]
            longest = max(told, key=lambda each: each.seconds, default=None)
            if self._intervals.setdefault(group, GrowingInterval()).is_due(longest):
                assert longest is not None, "only a standstill is said"
                level = "hangs: " if longest.is_hang else ""
                logger.warning("%s: %s%s", stage, level, longest.text)
            if longest is not None:
                shown[stage] = longest.text
        for group in self._intervals.keys() - standstills.keys():
            del self._intervals[group]
        return shown

    def _end_silent(self, group: str, standstill: Standstill) -> None:
        if not standstill.is_hang:
            return
        new = [each for each in standstill.silent if (group, each.number) not in self._ended]
        self._ended.update((group, each.number) for each in new)
        if new:
            threading.Thread(
                target=_end_on_nodes, args=(new,), name="end of stopped processes", daemon=True
            ).start()


def _end_on_nodes(heartbeats: Sequence[Heartbeat]) -> None:
    # Ray's process for it starts meanwhile.
    enders: list[Any] = [
        _ender_class.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(each.process.node, soft=False)
        ).remote()
        for each in heartbeats
    ]
    time.sleep(_HEAD_START_S)
    try:
        refs = [
            ender.end.remote(each.process) for ender, each in zip(enders, heartbeats, strict=True)
        ]
        for heartbeat, ref in zip(heartbeats, refs, strict=True):
            report_end(heartbeat, ray.get(ref, timeout=_END_TIMEOUT_S))
    except RayError as error:
        # Its node is away, and the process with it, for all that this cluster knows.
        logger.warning("a silent process cannot be ended (%s)", type(error).__name__)
    for ender in enders:
        ray.kill(ender)


class _Ender:
    def end(self, process: ProcessId) -> str | None:
        return end_process(process)


_ender_class: Any = ray.remote(num_cpus=0, max_restarts=0)(_Ender)
