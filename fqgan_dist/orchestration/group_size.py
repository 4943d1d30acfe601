"""How many train workers the next start has, and when a training makes way for more of them.

Decided from what nodes have: nothing here asks Ray (`free_room` does).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fqgan_dist.orchestration.config import TrainWorkersConfig

_MOST_DOUBLINGS = 6
# Ray counts in ten-thousandths; sums of fractions in binary are a little off.
_ROUNDING = 1e-6


def count_fitting(nodes: Sequence[Mapping[str, float]], workers: TrainWorkersConfig) -> int:
    """Count the train workers that fit on nodes with these resources, placed as configured."""
    each = [_count_on_node(node, workers.amounts) for node in nodes]
    match workers.placement:
        case "PACK" | "SPREAD":
            return sum(each)
        case "STRICT_PACK":
            return max(each, default=0)
        case "STRICT_SPREAD":
            return sum(count > 0 for count in each)


def _count_on_node(node: Mapping[str, float], amounts: Mapping[str, float]) -> int:
    return min(
        (math.floor(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in amounts.items()),
        default=0,
    )


def largest_fitting(sizes: Sequence[int], num_fitting: int) -> int | None:
    """Give the largest of some sizes for which there is room, None if there is for none."""
    return max((size for size in sizes if size <= num_fitting), default=None)


@dataclass
class GrowthWatch:
    """Decides when a group that could be larger makes way.

    Room must last for `after_s`. A growth that was in vain, and a loss of workers, double that, up
    to 64 times: nodes that come and go cost a training less than a restart each. A start that keeps
    its workers for longer than the longest such wait, or is complete, forgives all.
    """

    sizes: Sequence[int]
    """Valid ones, ascending."""
    after_s: float
    clock: Callable[[], float] = time.monotonic
    size: int | None = None
    """Of the present start."""
    wanted: int | None = None
    """Size for which the present start was asked to make way."""
    _num_doublings: int = 0
    _began: float = 0.0
    _since: float | None = None
    """When room for more was seen, and at every look after it."""

    def begin(self, size: int) -> None:
        """Note a start with so many workers."""
        now = self.clock()
        former = self.size
        if former is not None:
            has_lasted = now - self._began > self.after_s * 2**_MOST_DOUBLINGS
            if size == self.sizes[-1] or (has_lasted and size >= former):
                self._num_doublings = 0
            elif size < former or (self.wanted is not None and size <= former):
                self._num_doublings = min(self._num_doublings + 1, _MOST_DOUBLINGS)
        self.size, self.wanted, self._since, self._began = size, None, None, now

    @property
    def wait_s(self) -> float:
        """For how long there must be room before this start makes way."""
        return self.after_s * 2**self._num_doublings

    @property
    def could_grow(self) -> bool:
        """Whether there is a larger valid size that nobody was asked to make way for yet."""
        return self.wanted is None and self.size is not None and self.size < self.sizes[-1]

    def look(self, num_fitting: int) -> int | None:
        """Take the number of workers that would fit; gives the size to make way for, once.

        Args:
            num_fitting: those of the present group included.
        """
        assert self.size is not None, "a start begins first"
        size = largest_fitting(self.sizes, num_fitting)
        now = self.clock()
        if size is None or size <= self.size:
            self._since = None
            return None
        if self._since is None:
            self._since = now
        if now - self._since < self.wait_s:
            return None
        self.wanted = size
        return size
