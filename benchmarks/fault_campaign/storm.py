"""The storm: which fault comes when, from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

FaultName = Literal[
    "kill rank",
    "kill all ranks",
    "stop rank",
    "kill node",
    "kill driver",
    "kill head",
    "kill pool actor",
    "drain node",
    "storage outage",
    "slow storage",
    "full disk",
    "no capacity",
]
FAULTS: tuple[FaultName, ...] = get_args(FaultName)
LASTS_S: dict[FaultName, tuple[float, float]] = {
    "storage outage": (10, 120),
    "slow storage": (10, 60),
    "full disk": (10, 60),
    "no capacity": (60, 180),
    "drain node": (15, 25),  # until the node is off
    "kill node": (5, 30),  # until another one is there
}
"""Shortest and longest; what is not named is over at once."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One event."""

    name: FaultName
    pause_s: float
    """After the one before was over."""
    lasts_s: float
    choice: float
    """In [0, 1): which of those whom it can meet."""


def plan_storm(
    seed: int, *, mean_pause_s: float, longest_s: float, names: Sequence[FaultName] = FAULTS
) -> Iterator[Fault]:
    """Give faults without end; every kind comes once before any comes again.

    Args:
        seed: decides all.
        mean_pause_s: mean of the pauses, which have no memory.
        longest_s: no fault lasts longer, for short campaigns.
        names: those that there are.
    """
    random = Random(seed)
    while True:
        for name in random.sample(names, len(names)):
            low, high = LASTS_S.get(name, (0, 0))
            yield Fault(
                name=name,
                pause_s=random.expovariate(1 / mean_pause_s),
                lasts_s=min(random.uniform(low, high), longest_s),
                choice=random.random(),
            )
