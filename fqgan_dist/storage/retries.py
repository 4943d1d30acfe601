"""Repeated requests: how long to wait, what to count, what to say."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fqgan_dist.storage.s3_errors import RequestError

_logger = logging.getLogger(__name__)

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_LOG_EVERY_S = 30.0

T = TypeVar("T")


class RequestRetries:
    """Tries requests again, and counts it. Safe to use from several threads."""

    def __init__(self) -> None:
        self.num_retries = 0
        self._lock = threading.Lock()
        self._logged_at: float | None = None
        self._num_logged = 0

    async def run(
        self, request: Callable[[], Awaitable[T]], *, progress: Callable[[], int] = lambda: 0
    ) -> T:
        """Make a request until it succeeds or there is no hope.

        `progress` counts what the tries have achieved together. A try that achieved something
        counts as the first one: a long body that breaks off now and then is read.

        Raises:
            RequestError: the last error.
        """
        tries = 0
        achieved = progress()
        while True:
            try:
                return await request()
            except RequestError as error:
                now_achieved = progress()
                tries = 1 if now_achieved > achieved else tries + 1
                achieved = now_achieved
                error.tries = tries
                if tries >= error.max_attempts:
                    raise
                self._note(error)
            # The jitter keeps many clients from coming back at the same moment.
            wait_s = min(_FIRST_WAIT_S * 2 ** (tries - 1), _LONGEST_WAIT_S)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))

    def _note(self, error: RequestError) -> None:
        now = time.monotonic()
        with self._lock:
            self.num_retries += 1
            # A store that throttles answers thousands of requests like this.
            if self._logged_at is not None and now - self._logged_at < _LOG_EVERY_S:
                return
            count = self.num_retries - self._num_logged
            self._logged_at, self._num_logged = now, self.num_retries
        _logger.warning(
            "object storage: requests repeated: %d since the last such line, %d in all; the last "
            "after: %s",
            count,
            self.num_retries,
            error,
        )
