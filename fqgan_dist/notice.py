"""Notice that this process, or its node, is about to end: who gives it, who heeds it.

A signal, a node that Ray drains, a spot instance that EC2 takes back, or the driver on behalf of
any of them gives notice. A training looks once a step: it finishes the step, saves at once, waits
for the commit and ends with `NoticeError`. What does not train heeds nothing, and just ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from fqgan_dist.errors import NoticeError


@dataclass(frozen=True)
class Notice:
    """What is known of an end that is near."""

    reason: str
    """For example `SIGTERM` or `Ray drains node 10.0.0.7`."""
    deadline_s: float | None = None
    """Unix seconds; None where nobody says."""


class NoticeSource(Protocol):
    """Somebody who may give notice, asked again and again by a thread of its own."""

    interval_s: float
    """Between two questions."""

    def look(self) -> Notice | None:
        """Ask; None: no notice, or no answer. Never raises, and waits for seconds at most."""
        ...


class Notices:
    """The notice given to one process.

    Without locks, as a signal's handler gives it, in the middle of whatever the main thread does:
    of two notices given at the same instant one may be forgotten, which changes nothing.
    """

    def __init__(self) -> None:
        """Begin without notice."""
        self._notice: Notice | None = None
        self._num_heeding = 0

    def give(self, reason: str, deadline: float | None = None) -> None:
        """Give notice; the first reason stays, and the earliest deadline (Unix seconds)."""
        former = self._notice
        if former is None:
            self._notice = Notice(reason, deadline)
        elif deadline is not None and (former.deadline_s is None or deadline < former.deadline_s):
            self._notice = Notice(former.reason, deadline)

    def given(self) -> Notice | None:
        """Give the notice, if there is one; costs nothing."""
        return self._notice

    def clear(self) -> None:
        """Forget it."""
        self._notice = None

    def raise_if_given(self) -> None:
        """End what heeds notice.

        Raises:
            NoticeError: notice was given.
        """
        if notice := self._notice:
            raise NoticeError(
                f"{notice.reason}: what was committed stays, the same command goes on"
            )

    @property
    def is_heeded(self) -> bool:
        """Whether somebody in this process looks for notice, and ends soon after it."""
        return self._num_heeding > 0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Note that a block looks for notice: a signal need not end it by force."""
        self._num_heeding += 1
        try:
            yield
        finally:
            self._num_heeding -= 1


NOTICES = Notices()
"""Those of this process."""


@contextmanager
def watching(sources: Sequence[NoticeSource], notices: Notices = NOTICES) -> Iterator[None]:
    """Ask sources during a block, each in a thread, until it has given notice."""
    stop = threading.Event()

    def watch(source: NoticeSource) -> None:
        while not stop.is_set():
            if notice := source.look():
                if not stop.is_set():
                    notices.give(notice.reason, notice.deadline_s)
                return
            stop.wait(source.interval_s)

    threads = [
        threading.Thread(target=watch, args=(source,), name="notice", daemon=True)
        for source in sources
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        # Not joined: one may be in the middle of a question that nobody answers.
        stop.set()
