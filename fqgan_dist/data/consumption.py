"""Which samples of the endless stream were trained on, as a number that any partition adds up to.

Each position contributes a hash of itself and of the sample that was loaded for it; contributions
are added modulo 2^128. So ranks, loader workers and members of a loss group may count their own
share in any order, and the sum can be computed again from the order alone. It finds what goes wrong
by mistake, not a forger.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fqgan_dist.data.order import SampleOrder

_LANES = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
_CHUNK = 2**20


@dataclass(frozen=True)
class OrderId:
    """What decides the order of samples; the order itself follows from it (order.py)."""

    dataset_id: str
    """sha256 of the dataset's index."""
    num_samples: int
    """Samples of an epoch."""
    seed: int
    window_shards: int
    """Shards whose samples are mixed with each other."""


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A sample that was loaded in the place of a damaged one."""

    position: int
    """Of the damaged one in the endless stream."""
    shard: int
    """Index of the stand-in's shard."""
    row: int
    """Row of the stand-in there."""


@dataclass(frozen=True, kw_only=True)
class Consumed:
    """A run of consecutive positions that were loaded for training."""

    start: int
    """First position."""
    end: int
    """One past the last."""
    digest: tuple[int, int]
    """Sum of the contributions, modulo 2^64 each."""
    stand_ins: tuple[StandIn, ...] = ()
    """In the order of positions."""

    @property
    def hex_digest(self) -> str:
        return "".join(f"{lane:016x}" for lane in self.digest)


def consume(start: int, due: np.ndarray, loaded: np.ndarray) -> Consumed:
    """Account for consecutive positions from `start` on.

    Args:
        start: the first one.
        due: (n, 2) int64, shard and row of each position's sample.
        loaded: (n, 2) int64, those that were loaded for them.
    """
    positions = np.arange(start, start + len(loaded))
    stand_ins = tuple(
        StandIn(position=start + int(index), shard=int(loaded[index, 0]), row=int(loaded[index, 1]))
        for index in np.flatnonzero((due != loaded).any(axis=1))
    )
    return Consumed(
        start=start,
        end=start + len(loaded),
        digest=digest_samples(positions, loaded[:, 0], loaded[:, 1]),
        stand_ins=stand_ins,
    )


def digest_samples(positions: np.ndarray, shards: np.ndarray, rows: np.ndarray) -> tuple[int, int]:
    """Sum the contributions of samples at positions; three int64 arrays of one length."""
    columns = [np.asarray(each).astype(np.uint64) for each in (positions, shards, rows)]
    sums = []
    for lane in _LANES:
        mixed = np.full(len(columns[0]), lane)
        for column in columns:
            mixed = _mix(mixed + column * lane)
        sums.append(int(mixed.sum(dtype=np.uint64)))
    return sums[0], sums[1]


def expect(order: SampleOrder, start: int, end: int, stand_ins: Iterable[StandIn]) -> Consumed:
    """Compute what consuming positions of an order must have given, these stand-ins included."""
    chosen = {each.position: each for each in stand_ins}
    total = (0, 0)
    for first in range(start, end, _CHUNK):
        positions = np.arange(first, min(end, first + _CHUNK))
        found = order.locate(positions)
        shards, rows = found.shards.copy(), found.rows.copy()
        for position, each in chosen.items():
            if first <= position < first + len(positions):
                shards[position - first], rows[position - first] = each.shard, each.row
        total = _add(total, digest_samples(positions, shards, rows))
    return Consumed(start=start, end=end, digest=total, stand_ins=tuple(chosen.values()))


def join(parts: Iterable[Consumed]) -> list[Consumed]:
    """Join runs that follow one another; what was counted twice by one process counts once.

    Runs that overlap in another way are left as they are: whoever looks finds them.
    """
    distinct = dict.fromkeys(parts)
    joined: list[Consumed] = []
    for part in sorted(distinct, key=lambda each: (each.start, each.end)):
        if joined and joined[-1].end == part.start:
            last = joined.pop()
            part = Consumed(
                start=last.start,
                end=part.end,
                digest=_add(last.digest, part.digest),
                stand_ins=last.stand_ins + part.stand_ins,
            )
        joined.append(part)
    return joined


def _add(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    first, second = ((a + b) % 2**64 for a, b in zip(one, other, strict=True))
    return first, second


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers one to one (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
