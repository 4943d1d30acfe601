"""Waiting for what another thread or process does, without guessing how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

_DEADLINE_S = 60.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds; fail after a minute."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came to hold"
        time.sleep(0.005)
