"""What this process is doing and when it last moved: the account that a watchdog looks at.

Whoever works marks what begins; that is an assignment or two, without a lock, a system call or a
look at a device. What waits for something known (`waiting`) is no standstill, whatever its length.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.stopped_processes import ProcessId
from fqgan_dist.waiting import WAITS, Waits

Pace = Literal["idle", "slow", "steady"]
"""`idle`: nothing is expected of it. `slow`: nobody knows how long it takes (a start, compilation,
evaluation, a save). `steady`: it is repeated, so that its median length says what is too long."""

# Not a thread's own: the requests of a bucket run in a loop of theirs, with their caller's context.
_is_aside: ContextVar[bool] = ContextVar("fqgan_is_aside", default=False)
STEADY_FACTOR = 20.0
"""How many times its median length a step or chunk may take, see `WatchdogConfig`."""
_REMEMBERED = 101
_PACE_IS_KNOWN_AFTER = 3
"""Repetitions: the first ones compile, fill caches and start loaders."""


class WatchdogConfig(Config):
    """When a rank or actor that does not move is believed to hang, and its attempt is ended.

    What waits for storage or capacity and knows it is not meant: see `patience`.
    """

    after_s: float = Field(default=120.0, gt=0)
    """Without a move: at least so long, and at least 20 times the median step (or chunk)."""
    slow_after_s: float = Field(default=900.0, gt=0)
    """The same where no pace is known: the start and the first steps or chunks, which compile, an
    evaluation, a save. An answer of the storage is a move there."""
    warn_after_s: float = Field(default=30.0, gt=0)
    """After so long a line says that nothing moves, and what every rank is doing."""


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What a process is doing, as a watchdog sees it."""

    phase: str
    """For example `step 7`."""
    pace: Pace
    """`slow` also for what is steady, while its pace is not known yet."""
    is_loading: bool
    """Whether it waits for a batch of the loader."""
    still_s: float
    """Seconds since it last moved."""
    median_s: float | None
    """Median length of its steps or chunks; None while it is not known."""
    waiting: str
    """What it is known to wait for; "" for nothing."""


@dataclass(frozen=True, kw_only=True)
class Helper:
    """What is known of processes that work for this one, such as loader workers."""

    waiting: str = ""
    """What one of them is known to wait for; "" for nothing."""
    still_s: float | None = None
    """Seconds since the storage last answered one of them; None: never."""
    processes: tuple[ProcessId, ...] = ()
    """Those that were heard of."""


@dataclass(frozen=True)
class _Phase:
    text: str
    pace: Pace
    is_loading: bool
    counts_storage: bool


class Activity:
    """What one process is doing; one thread marks it, and any may look."""

    def __init__(
        self, *, waits: Waits = WAITS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin idle."""
        self._waits = waits
        self._clock = clock
        self._phase = _Phase("no work", "idle", is_loading=False, counts_storage=False)
        self._moved_at = self._storage_at = self._unit_at = clock()
        self._units: deque[float] = deque(maxlen=_REMEMBERED)
        self._num_units = 0
        self._helper_numbers = itertools.count()
        self._helpers: dict[int, Callable[[], Helper]] = {}

    def enter(
        self,
        phase: str,
        *,
        pace: Pace = "slow",
        is_loading: bool = False,
        counts_storage: bool = False,
    ) -> None:
        """Note what is done from now on.

        An answer of the storage counts as a move of it if it loads a batch, if nobody knows how
        long it takes, or if that is said.
        """
        counts_storage = counts_storage or is_loading or pace == "slow"
        self._phase = _Phase(phase, pace, is_loading, counts_storage)
        self._moved_at = self._clock()

    @contextmanager
    def during(self, phase: str, *, pace: Pace = "slow") -> Iterator[None]:
        """Note what a block does; after it what was done before goes on."""
        former = self._phase
        self.enter(phase, pace=pace)
        try:
            yield
        finally:
            self._phase, self._moved_at = former, self._clock()

    def rest(self) -> None:
        """Note that nothing is expected."""
        self.enter("no work", pace="idle")

    def move(self) -> None:
        """Note that what is done goes on."""
        self._moved_at = self._clock()

    def note_storage(self) -> None:
        """Note that the storage answered, to any thread: a move of what waits for it."""
        if not _is_aside.get():
            self._storage_at = self._clock()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count no answer of the storage to a block: it polls, or writes a log of standstill."""
        token = _is_aside.set(True)
        try:
            yield
        finally:
            _is_aside.reset(token)

    def begin_unit(self) -> None:
        """Note that a step or chunk begins."""
        self._unit_at = self._moved_at = self._clock()

    def end_unit(self) -> None:
        """Note that a step or chunk ends, whose length counts."""
        self._moved_at = now = self._clock()
        self._units.append(now - self._unit_at)
        self._num_units += 1

    def forget_pace(self) -> None:
        """Forget how long steps or chunks take: those of other work come."""
        self._units.clear()
        self._num_units = 0

    def forgive(self, seconds: float) -> None:
        """Do not count a time in which this process was stopped as a whole."""
        self._moved_at += seconds

    @contextmanager
    def helped_by(self, look: Callable[[], Helper]) -> Iterator[None]:
        """Count what helpers wait for, and the answers they get, as this process's, for a block."""
        number = next(self._helper_numbers)
        self._helpers[number] = look
        try:
            yield
        finally:
            del self._helpers[number]

    def helper_processes(self) -> list[ProcessId]:
        """List the processes that work for this one."""
        return [each for look in tuple(self._helpers.values()) for each in look().processes]

    @property
    def storage_still_s(self) -> float:
        """Seconds since the storage last answered."""
        return max(0.0, self._clock() - self._storage_at)

    def glance(self) -> Glance:
        """Tell what is done now."""
        phase, now = self._phase, self._clock()
        helpers = [look() for look in tuple(self._helpers.values())]
        still_s = [now - self._moved_at, now - self._waits.ended_at]
        if phase.counts_storage:
            still_s.append(now - self._storage_at)
            still_s.extend(helper.still_s for helper in helpers if helper.still_s is not None)
        is_known = self._num_units >= _PACE_IS_KNOWN_AFTER
        waiting = [self._waits.known(), *(helper.waiting for helper in helpers)]
        return Glance(
            phase=phase.text,
            pace="slow" if phase.pace == "steady" and not is_known else phase.pace,
            is_loading=phase.is_loading,
            still_s=max(0.0, min(still_s)),
            median_s=statistics.median(tuple(self._units)) if is_known else None,
            waiting=next(filter(None, waiting), ""),
        )


ACTIVITY = Activity()
"""That of this process."""
