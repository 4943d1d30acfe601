"""Goodput of a training on spot nodes against its checkpoint interval, simulated and by formula.

A step of all nodes ends when one node is lost. What was done since the newest checkpoint is lost,
recovery takes its time, and may itself be interrupted. Losses come without memory, each node by
itself. Beside it stand the formulas: Young (1974), the first order optimum; Daly (2006), a higher
order optimum and the exact expectation, eq. 20, which the simulation must meet without notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True)
class Spot:
    """How often nodes are lost, and what one loss costs."""

    num_nodes: int
    losses_per_node_hour: float
    recovery_s: float
    """From the loss to the first step, work that is done again not included."""
    save_s: float
    """For which a checkpoint stops training."""
    noticed: float = 0.0
    """Fraction of losses before which the training saves: nothing is lost but the recovery."""

    @property
    def mean_time_s(self) -> float:
        """Mean time between losses of any node."""
        return 3600 / (self.num_nodes * self.losses_per_node_hour)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one interval gives on so many nodes."""

    rate: str
    num_nodes: int
    interval_s: float
    simulated: float
    """Useful time over all time."""
    expected: float
    """The same by Daly's expectation, which knows of no notice."""
    young_s: float
    """Interval that is best by Young."""
    daly_s: float
    """Interval that is best by Daly."""


def hourly_rate(per_month: float) -> float:
    """Change the fraction of nodes that are lost in a month to losses per node and hour."""
    return -math.log(1 - per_month) / HOURS_PER_MONTH


def simulate(spot: Spot, interval_s: float, *, seed: int, num_losses: int = 4000) -> float:
    """Give the goodput over so many losses, with checkpoints every `interval_s` of useful time."""
    random = Random(seed)
    useful = total = 0.0
    segment_s = interval_s + spot.save_s
    recovery_left = 0.0
    for _ in range(num_losses):
        left = random.expovariate(1 / spot.mean_time_s)
        total += left
        if left < recovery_left:
            recovery_left = spot.recovery_s  # it begins again
            continue
        left -= recovery_left
        num_saved = int(left // segment_s)
        useful += num_saved * interval_s
        if random.random() < spot.noticed:
            useful += min(left - num_saved * segment_s, interval_s)
        recovery_left = spot.recovery_s
    return useful / total


def expected_goodput(spot: Spot, interval_s: float) -> float:
    """Give Daly's expectation: M exp(R/M) (exp((tau + delta)/M) - 1) / tau of time for each tau."""
    mean = spot.mean_time_s
    exponent = (interval_s + spot.save_s) / mean
    if exponent + spot.recovery_s / mean > 700:  # beyond floats: nothing is ever done
        return 0.0
    return interval_s / (mean * math.exp(spot.recovery_s / mean) * math.expm1(exponent))


def young_interval_s(spot: Spot) -> float:
    return math.sqrt(2 * spot.save_s * spot.mean_time_s)


def daly_interval_s(spot: Spot) -> float:
    """Give Daly's optimum of higher order; the mean time itself where saving takes twice that."""
    mean, save = spot.mean_time_s, spot.save_s
    if save >= 2 * mean:
        return mean
    ratio = save / (2 * mean)
    return math.sqrt(2 * save * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def simulate_all(
    rates: Sequence[tuple[str, float]],
    nodes: Sequence[int],
    intervals_s: Sequence[float],
    *,
    recovery_s: float,
    save_s: float,
    noticed: float,
    seed: int,
) -> Iterator[Row]:
    """Simulate every rate (name, losses per node and hour) with every number and interval."""
    for name, rate in rates:
        for count in nodes:
            spot = Spot(
                num_nodes=count,
                losses_per_node_hour=rate,
                recovery_s=recovery_s,
                save_s=save_s,
                noticed=noticed,
            )
            for interval_s in intervals_s:
                yield Row(
                    rate=name,
                    num_nodes=count,
                    interval_s=interval_s,
                    simulated=simulate(spot, interval_s, seed=seed),
                    expected=expected_goodput(spot, interval_s),
                    young_s=young_interval_s(spot),
                    daly_s=daly_interval_s(spot),
                )
