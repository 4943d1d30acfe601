"""Repeated requests: how long, what to count, what to say.

What counts is time without progress, not tries: a server that refuses at once is as gone as one
that does not answer. See `waiting` for how long that is.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.storage.s3_errors import RequestError
from fqgan_dist.waiting import WAITS, is_part_of_run, storage_patience_s

_logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_LOG_EVERY_S = 30.0
_FIRST_CONTACT_S = 10.0
"""For a server that this process has never heard of: a wrong address is more likely than an outage,
unless a run has found it before."""

T = TypeVar("T")


class RequestRetries:
    """Tries requests again, and counts it. Safe to use from several threads."""

    def __init__(self) -> None:
        self.num_retries = 0
        self._lock = threading.Lock()
        self._logged_at: float | None = None
        self._num_logged = 0
        self._has_answered = False
        self._outage = _Outage()

    async def run(
        self, request: Callable[[], Awaitable[T]], *, progress: Callable[[], int] = lambda: 0
    ) -> T:
        """Make a request until it succeeds, there is no hope, or patience ends.

        `progress` counts what the tries have achieved together. A try that achieved something
        counts as the first one: a long body that breaks off now and then is read.

        Raises:
            RequestError: the last error.
        """
        tries, began, is_waiting = 0, time.monotonic(), False
        achieved = progress()
        try:
            while True:
                try:
                    result = await request()
                except RequestError as error:
                    self._has_answered |= error.kind == "answer"
                    now, now_achieved = time.monotonic(), progress()
                    if tries == 0 or now_achieved > achieved:
                        tries, began, achieved = 0, now, now_achieved
                    tries += 1
                    error.tries, error.waited_s = tries, now - began
                    left_s = began + self._patience_s(error) - now
                    if not error.is_passing or left_s <= 0:
                        raise
                    if not is_waiting:
                        self._outage.enter()
                        is_waiting = True
                    self._note(error)
                else:
                    self._has_answered = True
                    ACTIVITY.note_storage()
                    return result
                # The jitter keeps many clients from coming back at the same moment.
                wait_s = min(_FIRST_WAIT_S * 2 ** min(tries - 1, 20), _LONGEST_WAIT_S)
                await asyncio.sleep(min(wait_s * random.uniform(0.5, 1.0), left_s))
        finally:
            if is_waiting:
                self._outage.leave()

    def _patience_s(self, error: RequestError) -> float:
        patience_s = storage_patience_s()
        is_stranger = error.kind == "unreachable" and not (self._has_answered or is_part_of_run())
        return min(patience_s, _FIRST_CONTACT_S) if is_stranger else patience_s

    @property
    def waited_s(self) -> float:
        """Seconds in which requests waited to be repeated, so far."""
        return self._outage.total_s()

    def _note(self, error: RequestError) -> None:
        now = time.monotonic()
        with self._lock:
            self.num_retries += 1
            self._outage.describe(str(error))
            # A store that throttles answers thousands of requests like this.
            if self._logged_at is not None and now - self._logged_at < _LOG_EVERY_S:
                return
            count = self.num_retries - self._num_logged
            self._logged_at, self._num_logged = now, self.num_retries
        _logger.warning(
            "object storage: requests repeated: %d since the last such line, %d in all; waiting "
            "since %.0f s, for up to %.0f s without progress; the last after: %s",
            count,
            self.num_retries,
            self._outage.seconds(),
            self._patience_s(error),
            error,
        )


class _Outage:
    """The time in which any request of a store waits, shown to whoever watches the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._began = 0.0
        self._past_s = 0.0
        self._wait: int | None = None

    def enter(self) -> None:
        with self._lock:
            self._num_waiting += 1
            if self._num_waiting == 1:
                self._began = time.monotonic()
                self._wait = WAITS.begin("object storage")

    def leave(self) -> None:
        with self._lock:
            self._num_waiting -= 1
            if self._num_waiting or self._wait is None:
                return
            WAITS.end(self._wait)
            self._wait = None
            seconds = time.monotonic() - self._began
            self._past_s += seconds
        if seconds >= _LOG_EVERY_S:
            _logger.warning("object storage: no request waits any more, after %.0f s", seconds)

    def describe(self, reason: str) -> None:
        with self._lock:
            if self._wait is not None:
                WAITS.change(self._wait, f"object storage: {reason}")

    def seconds(self) -> float:
        with self._lock:
            return time.monotonic() - self._began if self._num_waiting else 0.0

    def total_s(self) -> float:
        return self._past_s + self.seconds()
