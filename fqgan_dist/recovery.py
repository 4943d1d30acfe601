"""What a restart of a training is made of: which part took how long.

Up to the start of the new train workers the driver knows the times, after it their main rank; both
write Unix seconds, so that the clocks of two nodes are as close as NTP keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass
class DriverTimes:
    """What the driver knows of a restart; None: not yet, or nobody saw it."""

    ended_at: float | None = None
    """A rank of the former group had its error, or was heard of for the last time."""
    detected_at: float | None = None
    """The driver was told that the group had ended."""
    asked_at: float | None = None
    """A new group was asked for, for the first time if more than once."""
    capacity_s: float = 0.0
    """Seconds since then in which its resources were not there."""
    num_workers: int | None = None
    """Size of the present group, of a first start too."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        return cls(**values)


class Recovery:
    """The times of one process's start; without a driver only those that it sees itself."""

    def __init__(self) -> None:
        """Begin with now."""
        self.begin(lambda: None)

    def begin(self, ask_driver: Callable[[], DriverTimes | None]) -> None:
        """Note that this process's part begins now.

        `ask_driver` is called once, when all is over; None: it knows of no restart.
        """
        self._ask_driver = ask_driver
        self.num_workers: int | None = None
        """As the driver has said by the time that `parts` was called."""
        self._began_at = time.time()

    def parts(self, *, restored_at: float, stepped_at: float) -> dict[str, float]:
        """Give the seconds of each part by name, in their order, those that are known.

        Args:
            restored_at: the checkpoint was loaded, and everything built; Unix seconds.
            stepped_at: the first step was done.
        """
        driver = self._ask_driver() or DriverTimes()
        self.num_workers = driver.num_workers
        asked_at = driver.asked_at
        placed_at = None if asked_at is None else asked_at + driver.capacity_s
        moments = {
            "detection": (driver.ended_at, driver.detected_at),
            "pause": (driver.detected_at, asked_at),
            "capacity": (asked_at, placed_at),
            "group_start": (placed_at, self._began_at),
            "restore": (self._began_at, restored_at),
            "first_step": (restored_at, stepped_at),
        }
        return {
            name: max(0.0, end - begin)
            for name, (begin, end) in moments.items()
            if begin is not None and end is not None
        }


RECOVERY = Recovery()
"""That of this process."""
