"""Whether processes that work together stand still, since when, and who is the likely culprit.

Every process sends a heartbeat a second from a thread of its own; who collects them keeps the
newest of each in a `HeartbeatTable` and judges. What steps together (a group of ranks) stands still
together, in the end; actors of a pool are judged one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fqgan_dist.activity import STEADY_FACTOR, Glance, WatchdogConfig
from fqgan_dist.stopped_processes import ProcessId
from fqgan_dist.telemetry.summary import format_seconds

HEARTBEAT_S = 1.0

# A collector that was not called for longer was stopped itself, or its machine was.
_FROZEN_S = 5.0
_MAX_SILENT_S = 10.0
_STEADY_WARNING_FACTOR = 3.0
_SHOWN_NUMBERS = 8


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a process tells of itself; plain values."""

    group: str
    """Of an attempt or a pool; unique."""
    number: int
    """Rank, or number of the actor."""
    name: str
    """For messages, for example `rank 1/2 node0`."""
    world_size: int
    """Processes of the group that stand still together; 0: each is judged alone."""
    process: ProcessId
    phase: str
    still_s: float
    """Seconds since it last moved, by its own clock."""
    bound_s: float
    """After so long it is believed to hang."""
    warn_s: float
    silent_s: float
    """After so long without a heartbeat it is believed to be stopped."""
    after_s: float
    """After so long without a heartbeat, while nobody moves, it is believed to hang."""
    is_idle: bool
    is_loading: bool
    waiting: str
    """What it is known to wait for."""
    num_collectives: int | None
    """Collectives that it has entered; None where that is not known."""
    is_last: bool = False
    """Whether it ends, as it should."""

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Heartbeat:
        """Read what `asdict` gave."""
        return cls(**{**values, "process": ProcessId(**values["process"])})

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Who sends heartbeats."""

    group: str
    number: int
    name: str
    world_size: int
    process: ProcessId

    def heartbeat(
        self, glance: Glance, config: WatchdogConfig, *, num_collectives: int | None = None
    ) -> Heartbeat:
        """Say what is seen at a glance, with the bounds that hold for it."""
        bound_s, warn_s = find_bounds(glance, config)
        return Heartbeat(
            **vars(self),
            phase=glance.phase,
            still_s=glance.still_s,
            bound_s=bound_s,
            warn_s=warn_s,
            silent_s=min(_MAX_SILENT_S, config.after_s / 2),
            after_s=config.after_s,
            is_idle=glance.pace == "idle",
            is_loading=glance.is_loading,
            waiting=glance.waiting,
            num_collectives=num_collectives,
        )


def find_bounds(glance: Glance, config: WatchdogConfig) -> tuple[float, float]:
    """Give the seconds without a move after which a process hangs, and those before a warning."""
    if glance.pace == "steady" and glance.median_s is not None:
        bound_s = max(config.after_s, STEADY_FACTOR * glance.median_s)
        return bound_s, max(config.warn_after_s, _STEADY_WARNING_FACTOR * glance.median_s)
    return max(config.slow_after_s, config.after_s), config.warn_after_s


@dataclass(frozen=True, kw_only=True)
class Standstill:
    """What is said of processes that do not move."""

    seconds: float
    """Since the last of them moved."""
    places: str
    """What each is doing."""
    culprit: str
    """Who seems to be the cause, and why."""
    is_hang: bool
    """Whether the bound has passed."""
    silent: tuple[Heartbeat, ...] = ()
    """The last heartbeats of those that give none any more."""

    @property
    def text(self) -> str:
        """Say it in one line."""
        return f"nothing moves since {format_seconds(self.seconds)}: {self.culprit}; {self.places}"


@dataclass
class _Entry:
    heartbeat: Heartbeat
    arrived_at: float


@dataclass
class _Group:
    entries: dict[int, _Entry] = field(default_factory=dict)
    has_left: set[int] = field(default_factory=set)


class HeartbeatTable:
    """The newest heartbeat of every process of some groups. Not safe to use from several threads.

    A group that hangs is forgotten once that is said.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin empty."""
        self._clock = clock
        self._called_at = clock()
        self._groups: dict[str, _Group] = {}
        self._hangs: dict[str, Standstill] = {}

    def receive(self, heartbeat: Heartbeat) -> None:
        """Take a heartbeat in."""
        now = self._now()
        group = self._groups.setdefault(heartbeat.group, _Group())
        if heartbeat.is_last:
            group.entries.pop(heartbeat.number, None)
            group.has_left.add(heartbeat.number)
        elif heartbeat.number not in group.has_left:
            group.entries[heartbeat.number] = _Entry(heartbeat, now)

    def judge(self, name: str, number: int | None = None) -> Standstill | None:
        """Judge a group, or one member of those that are judged alone; None: it moves, or waits.

        A group that hangs does so for good.
        """
        if name in self._hangs:
            return self._hangs[name]
        group, now = self._groups.get(name), self._now()
        if group is None or not group.entries:
            return None
        entries = list(group.entries.values())
        is_together = entries[0].heartbeat.world_size > 0
        if not is_together:
            entries = [each for each in entries if each.heartbeat.number == number]
        ages = [(each.heartbeat, now - each.arrived_at) for each in entries]
        standstill = judge_together(ages, has_left=group.has_left) if ages else None
        if standstill is not None and standstill.is_hang and is_together:
            self._hangs[name] = standstill
        return standstill

    def judge_all(self) -> dict[str, list[Standstill]]:
        """Judge all groups; an actor that hangs is forgotten."""
        found: dict[str, list[Standstill]] = {}
        for name, group in self._groups.items():
            entries = list(group.entries.values())
            is_together = bool(entries) and entries[0].heartbeat.world_size > 0
            numbers = [None] if is_together else list(group.entries)
            for number in numbers:
                standstill = self.judge(name, number)
                if standstill is None:
                    continue
                found.setdefault(name, []).append(standstill)
                if number is not None and standstill.is_hang:
                    group.entries.pop(number, None)
        return found

    def forget(self, name: str) -> None:
        """Forget a group: its processes are gone."""
        self._groups.pop(name, None)
        self._hangs.pop(name, None)

    def _now(self) -> float:
        # Nobody was silent in a time in which nobody was heard because this process was stopped.
        now = self._clock()
        gap = now - self._called_at
        if gap > _FROZEN_S:
            for group in self._groups.values():
                for entry in group.entries.values():
                    entry.arrived_at += gap
        self._called_at = now
        return now


def judge_together(
    seen: Sequence[tuple[Heartbeat, float]], *, has_left: set[int] | frozenset[int] = frozenset()
) -> Standstill | None:
    """Judge processes by their last heartbeats and the seconds since these came.

    None: one of them has moved lately, or knows what it waits for.
    """
    silent = [beat for beat, age in seen if age >= beat.silent_s]
    alive = [beat for beat, age in seen if age < beat.silent_s]
    if any(beat.waiting or beat.is_idle for beat in alive):
        return None
    seconds = min(beat.still_s + age for beat, age in seen)
    is_over = all(
        age >= beat.after_s if age >= beat.silent_s else beat.still_s + age >= beat.bound_s
        for beat, age in seen
    )
    # Who is stopped needs no allowance for what the others may be doing.
    is_stopped = any(age >= beat.after_s for beat, age in seen) and all(
        beat.still_s + age >= beat.after_s for beat, age in seen
    )
    is_hang = is_over or is_stopped
    if not is_hang and seconds < min(beat.warn_s for beat in alive or silent):
        return None
    return Standstill(
        seconds=seconds,
        places=_describe_places(alive, silent),
        culprit=find_culprit(alive, silent, has_left=has_left),
        is_hang=is_hang,
        silent=tuple(silent),
    )


def find_culprit(
    alive: Sequence[Heartbeat], silent: Sequence[Heartbeat], *, has_left: set[int] | frozenset[int]
) -> str:
    """Name who seems to be the cause: the one that the others wait for."""
    if silent:
        return f"{_names(silent)} gives no sign of life: stopped, or its machine is out of reach"
    size = alive[0].world_size
    missing = sorted(set(range(size)) - {beat.number for beat in alive} - has_left)
    if missing:
        return f"rank {_numbers(missing)} of {size} was never heard of"
    loading = [beat for beat in alive if beat.is_loading]
    if loading:
        return f"the loader of {_names(loading)} gives no batch"
    counts = {beat.num_collectives for beat in alive}
    if None not in counts and len(counts) > 1:
        fewest = min(count for count in counts if count is not None)
        behind = [beat for beat in alive if beat.num_collectives == fewest]
        return f"{_names(behind)} has not entered the collective that the others wait in"
    if len(alive) == 1:
        return f"{alive[0].name} stands still by itself"
    return "no rank stands out"


def _describe_places(alive: Sequence[Heartbeat], silent: Sequence[Heartbeat]) -> str:
    by_phase: dict[str, list[int]] = {}
    for beat in alive:
        by_phase.setdefault(beat.phase, []).append(beat.number)
    for beat in silent:
        by_phase.setdefault(f"last heard in {beat.phase}", []).append(beat.number)
    what = "rank" if (*alive, *silent)[0].world_size else "actor"
    return ", ".join(f"{what} {_numbers(each)}: {phase}" for phase, each in by_phase.items())


def _names(beats: Sequence[Heartbeat]) -> str:
    if len(beats) == 1:
        return beats[0].name
    return f"rank {_numbers([beat.number for beat in beats])}"


def _numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:_SHOWN_NUMBERS]))
    more = len(numbers) - _SHOWN_NUMBERS
    return f"{shown} and {more} more" if more > 0 else shown
