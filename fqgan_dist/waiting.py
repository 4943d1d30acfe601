"""Waiting for what passes by itself: how long, since when, and for all to see.

An error is *passing* (`errors.PassingError`: storage out of reach or throttled, a full disk, no
capacity, a process or node lost), *permanent* (settings, data, code, numbers) or unknown. For what
is passing a run waits, says so, and goes on by itself; only `patience` without any progress ends
it. A process shows the longest of its present waits, whoever waits: on its progress, in the table
of the run, and as a metric.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import Field

from fqgan_dist.config import Config

STORAGE_VARIABLE = "FQGAN_STORAGE_PATIENCE_S"
"""Environment variable with the seconds that requests to the storage are repeated for. A run sets
it for all its processes; a command without one is for somebody who waits for it."""

WORTH_A_WORD_S = 5.0
"""A shorter wait is not shown."""

_COMMAND_PATIENCE_S = 60.0


class PatienceConfig(Config):
    """How long a run goes without any progress, by what is missing, before it ends.

    It ends with exit code 75 then, and the same command goes on.
    """

    storage_s: float = Field(default=6 * 3600.0, gt=0)
    """For the object storage to answer, or room on a disk."""
    capacity_s: float = Field(default=24 * 3600.0, gt=0)
    """For the resources of the train workers; includes `ray.train.start_timeout_s`."""
    losses_s: float = Field(default=4 * 3600.0, gt=0)
    """For a step of training, while processes or nodes are lost again and again."""


def storage_patience_s() -> float:
    """Give the seconds without progress after which a request to the storage is given up."""
    try:
        return float(os.environ.get(STORAGE_VARIABLE, ""))
    except ValueError:
        return _COMMAND_PATIENCE_S


def is_part_of_run() -> bool:
    """Whether this process works for a run that has found its storage before."""
    return STORAGE_VARIABLE in os.environ


def apply_patience(patience: PatienceConfig) -> None:
    """Let this process, and those that it starts, wait for the storage as a run does."""
    os.environ[STORAGE_VARIABLE] = repr(patience.storage_s)


@contextmanager
def patient(patience: PatienceConfig) -> Iterator[None]:
    """Apply patience to a block."""
    former = os.environ.get(STORAGE_VARIABLE)
    apply_patience(patience)
    try:
        yield
    finally:
        if former is None:
            del os.environ[STORAGE_VARIABLE]
        else:
            os.environ[STORAGE_VARIABLE] = former


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What a process waits for."""

    what: str
    """For example `object storage: 503 SlowDown`."""
    since: float
    """Unix seconds."""
    is_symptom: bool = False
    """Whether another wait, if there is one, says more."""

    @property
    def seconds(self) -> float:
        """How long it has been waited for."""
        return max(0.0, time.time() - self.since)

    def __str__(self) -> str:
        clock = datetime.fromtimestamp(self.since).strftime("%H:%M:%S")
        return f"waiting since {clock} ({self.seconds:.0f} s) for {self.what}"


class Waits:
    """The waits of one process; safe to use from several threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none; the clock is that of `ended_at`."""
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, Wait] = {}
        self._ended_at = self._clock()

    def begin(self, what: str, *, is_symptom: bool = False, since: float | None = None) -> int:
        """Note a wait, from now on if not since before; gives its number for `change` and `end`."""
        since = time.time() if since is None else since
        wait = Wait(what=what, since=since, is_symptom=is_symptom)
        with self._lock:
            number = next(self._numbers)
            self._open[number] = wait
        return number

    def change(self, number: int, what: str) -> None:
        """Say anew what is waited for; since when stays."""
        with self._lock:
            self._open[number] = replace(self._open[number], what=what)

    def end(self, number: int) -> None:
        """Forget a wait."""
        with self._lock:
            if not self._open.pop(number).is_symptom:
                self._ended_at = self._clock()

    @contextmanager
    def during(self, what: str, *, is_symptom: bool = False) -> Iterator[None]:
        """Note a wait for as long as a block runs."""
        number = self.begin(what, is_symptom=is_symptom)
        try:
            yield
        finally:
            self.end(number)

    def longest(self) -> Wait | None:
        """Give the wait that has lasted longest, if it is worth a word; None: there is none."""
        with self._lock:
            waits = self._open.values()
            wait = min(waits, key=lambda wait: (wait.is_symptom, wait.since), default=None)
        return wait if wait is not None and wait.seconds >= WORTH_A_WORD_S else None

    def cause(self) -> Wait | None:
        """Give the cause that is waited for now, of whatever length; None: there is none."""
        with self._lock:
            causes = (wait for wait in self._open.values() if not wait.is_symptom)
            return min(causes, key=lambda wait: wait.since, default=None)

    def known(self) -> str:
        """Name the cause that is waited for now, see `cause`; "": there is none."""
        wait = self.cause()
        return "" if wait is None else str(wait)

    @property
    def ended_at(self) -> float:
        """When the last wait for a cause ended, by the clock; at first, when this began."""
        return self._ended_at


WAITS = Waits()
"""Those of this process."""
