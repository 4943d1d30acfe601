"""Waiting for what another thread or process does, without guessing how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

_DEADLINE_S = 300.0  # a bound for what hangs: a busy machine takes minutes to start a Ray job


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds; fail after five minutes."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came to hold"
        time.sleep(0.005)
