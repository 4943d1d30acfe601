"""Paired, interleaved measurements, and what may be concluded from them.

    rounds = run_rounds({"plain": run_plain, "fast": run_fast}, control="plain")
    finding = rounds.compare("fast", over="plain", target=2.0, unit="images/s")

Every contestant runs once in every round, in an order drawn anew for each round, and one of them
runs twice: its two times must agree (the A/A control), otherwise the machine was too busy for any
conclusion and the verdict is "noisy", neither "met" nor "missed". A speed-up has to hold for the
ratio of the least times and for the median of the rounds' ratios; the interval is a bootstrap of
that median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["met", "missed", "noisy", "wrong", "not run", "no target"]
"""`wrong`: the result that was to be timed is not right. `not run`: something is not installed."""

DEFAULT_ROUNDS = 9
CONTROL_RANGE = (0.95, 1.05)
"""Where the ratios of a contestant to itself must lie."""

_RESAMPLES = 2000
_CONFIDENCE = 0.95
_SPIN_S = 0.1
_ONLY = "cost"


class WrongResultError(Exception):
    """What is to be timed does not do what it should."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of a benchmark's table."""

    subject: str
    """Part of the benchmark."""
    what: str
    """What was measured."""
    value: float | None = None
    """The measured value; of several rounds the best one."""
    unit: str = ""
    """Unit of the value."""
    over: str = ""
    """What the ratios compare it with."""
    ratio_of_minima: float | None = None
    """Least time of the other over least time of this: a speed-up."""
    median_ratio: float | None = None
    """Median over rounds of the same ratio."""
    interval: tuple[float, float] | None = None
    """95 % interval of `median_ratio`."""
    control: tuple[float, float] | None = None
    """A/A: ratio of minima and median ratio of one contestant to itself."""
    target: str = ""
    """What was to be reached."""
    verdict: Verdict = "no target"
    """What may be concluded."""
    note: str = ""
    """What a reader has to know about the number."""


@dataclass(frozen=True)
class Rounds:
    """Times of all contestants, round by round."""

    costs: Mapping[str, Sequence[float]]
    """Seconds per unit of work, by contestant; the rounds in order."""
    control: str
    """The contestant that ran twice in each round."""
    control_costs: Sequence[float]
    """Its second times."""

    def rate(self, name: str) -> float:
        """Give the best rate of a contestant: units of work per second."""
        return 1 / min(self.costs[name])

    def best(self, names: Sequence[str]) -> str:
        """Name the contestant with the least median time."""
        return min(names, key=lambda name: float(np.median(self.costs[name])))

    def control_ratios(self) -> tuple[float, float]:
        """Compare the control with itself: ratio of minima and median ratio."""
        return _compare(self.control_costs, self.costs[self.control])

    def compare(
        self,
        name: str,
        *,
        over: str,
        target: float | None,
        unit: str,
        subject: str = "",
        note: str = "",
    ) -> Finding:
        """Say by how much a contestant is faster than another one, and whether that is enough."""
        ratio_of_minima, median_ratio = _compare(self.costs[over], self.costs[name])
        control = self.control_ratios()
        return Finding(
            subject=subject,
            what=name,
            value=self.rate(name),
            unit=unit,
            over=over,
            ratio_of_minima=ratio_of_minima,
            median_ratio=median_ratio,
            interval=_bootstrap_median(_ratios(self.costs[over], self.costs[name])),
            control=control,
            target="" if target is None else f">= {target:g}x",
            verdict=judge_speed_up(ratio_of_minima, median_ratio, control, target),
            note=note,
        )

    def show(self, name: str, *, unit: str, subject: str = "", note: str = "") -> Finding:
        """Give the rate of a contestant that nothing is asked of."""
        return Finding(subject=subject, what=name, value=self.rate(name), unit=unit, note=note)


def run_rounds(
    contestants: Mapping[str, Callable[[], float]],
    *,
    control: str,
    rounds: int = DEFAULT_ROUNDS,
    warmup: int = 1,
    seed: int = 0,
) -> Rounds:
    """Run all contestants in every round.

    Args:
        contestants: each does a fixed amount of work and returns its seconds per unit of it, of
            whichever clock fits (CPU time for single threads, wall time for what waits).
        control: the one that runs twice.
        rounds: rounds that count.
        warmup: rounds before them that do not.
        seed: chooses the order within each round.
    """

    def measure_one(run: Callable[[], float]) -> Callable[[], Mapping[str, float]]:
        return lambda: {_ONLY: run()}

    named = {name: measure_one(run) for name, run in contestants.items()}
    return run_measures(named, control=control, rounds=rounds, warmup=warmup, seed=seed)[_ONLY]


def run_measures(
    contestants: Mapping[str, Callable[[], Mapping[str, float]]],
    *,
    control: str,
    rounds: int = DEFAULT_ROUNDS,
    warmup: int = 1,
    seed: int = 0,
) -> dict[str, Rounds]:
    """Run contestants each of whose runs gives several times, as `run_rounds` does; by measure.

    The control gives all measures; of each there are only those contestants that give it.
    """
    if control not in contestants or rounds < 1:
        raise ValueError(f"control {control!r} of {list(contestants)}, {rounds} rounds")
    order = [*contestants, None]  # None: the control's second run
    generator = np.random.default_rng(seed)
    taken: dict[str | None, list[Mapping[str, float]]] = {name: [] for name in order}
    for number in range(warmup + rounds):
        for place in generator.permutation(len(order)):
            name = order[place]
            costs = contestants[control if name is None else name]()
            if number >= warmup:
                taken[name].append(costs)

    def pick(name: str | None, measure: str) -> list[float]:
        return [costs[measure] for costs in taken[name]]

    return {
        measure: Rounds(
            {name: pick(name, measure) for name in contestants if measure in taken[name][0]},
            control,
            pick(None, measure),
        )
        for measure in taken[None][0]
    }


def judge_speed_up(
    ratio_of_minima: float, median_ratio: float, control: tuple[float, float], target: float | None
) -> Verdict:
    """Conclude from a comparison; nothing where the control says that times mean nothing."""
    if not all(CONTROL_RANGE[0] <= ratio <= CONTROL_RANGE[1] for ratio in control):
        return "noisy"
    if target is None:
        return "no target"
    return "met" if min(ratio_of_minima, median_ratio) >= target else "missed"


def judge_limit(
    subject: str,
    what: str,
    values: Sequence[float],
    *,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
    quiet: bool = True,
    note: str = "",
) -> Finding:
    """Compare the median of repeated measurements with an absolute limit.

    Args:
        subject: part of the benchmark.
        what: what was measured.
        values: the measurements.
        unit: their unit.
        at_most: the greatest good value; either this or `at_least`.
        at_least: the least good value.
        quiet: whether a control found the machine free. A busy one makes such values worse, never
            better, so only a miss needs a quiet machine.
        note: what a reader has to know.
    """
    if (at_most is None) == (at_least is None):
        raise ValueError("expected one of at_most and at_least")
    value = float(np.median(values))
    is_good = value <= at_most if at_most is not None else value >= (at_least or 0.0)
    target = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
    spread = f"{len(values)} runs: {min(values):.3g} to {max(values):.3g}"
    return Finding(
        subject=subject,
        what=what,
        value=value,
        unit=unit,
        target=target,
        verdict="met" if is_good else "missed" if quiet else "noisy",
        note="; ".join(filter(None, [spread if len(values) > 1 else "", note])),
    )


def measure_contention() -> float:
    """Run a loop that needs only a core: its wall time over its CPU time, 1 if undisturbed."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < _SPIN_S:
        pass
    return (time.perf_counter() - wall) / (time.process_time() - cpu)


def _ratios(over: Sequence[float], costs: Sequence[float]) -> np.ndarray:
    return np.asarray(over) / np.asarray(costs)


def _compare(over: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    return min(over) / min(costs), float(np.median(_ratios(over, costs)))


def _bootstrap_median(ratios: np.ndarray) -> tuple[float, float]:
    chosen = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    medians = np.median(ratios[chosen], axis=1)
    low, high = np.quantile(medians, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
