"""Time that passes when a test says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Stands at `now`, in seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now
