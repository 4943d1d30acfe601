"""A loop of steps that saves now and then: what saves cost it, and how writing slows its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from benchmarks.checkpointing.contenders import DCP_ASYNC, OURS, Contender
from benchmarks.checkpointing.settings import Settings
from benchmarks.paired import Finding, run_measures

NO_SAVES = "no saves"
STEP, LOOP = "step", "loop"
_MOST_SLOWED = 1.1
_UNIT = "steps/s"
_SIDE = 512
"""Of the matrices: a product takes milliseconds, so the interpreter's lock changes hands often."""
_CALIBRATION = 20


class Step:
    """Matrix products for about so many seconds."""

    def __init__(self, step_s: float) -> None:
        self._left, self._right = torch.rand(2, _SIDE, _SIDE)
        self._out = torch.empty(_SIDE, _SIDE)
        self._count = 1
        self()  # the first product loads the library
        product_s = min(_time(self) for _ in range(_CALIBRATION))
        self._count = max(1, round(step_s / product_s))

    def __call__(self) -> None:
        for _ in range(self._count):
            torch.mm(self._left, self._right, out=self._out)


@dataclass
class LoopTimes:
    """What the loops of one contender took, in seconds."""

    stalls: list[float] = field(default_factory=list)
    """Of each save: its step less the median of the loop's clean ones."""
    waits: list[float] = field(default_factory=list)
    """Of each save: for the one before it to be written, which is no stall of this one."""


def measure(
    place: str, contenders: Mapping[str, Contender], _gigabytes: float, settings: Settings
) -> list[Finding]:
    """Compare the steps, and the whole loop, with those of a loop that saves nothing."""
    step = Step(settings.step_s)
    seen = {name: LoopTimes() for name in (OURS, DCP_ASYNC)}
    measures = run_measures(
        {
            NO_SAVES: partial(run_clean_loop, step, settings),
            **{
                name: partial(run_loop, contenders[name], step, settings, times)
                for name, times in seen.items()
            },
        },
        control=NO_SAVES,
        rounds=settings.loops,
        warmup=0,
    )
    subject = f"{place}: training"
    steps, loops = measures[STEP], measures[LOOP]
    findings = [
        steps.show(
            NO_SAVES,
            unit=_UNIT,
            subject=subject,
            note=f"{settings.loops} loops of {settings.steps} steps, {settings.threads} threads",
        )
    ]
    for name, times in seen.items():
        finding = steps.compare(
            name,
            over=NO_SAVES,
            target=round(1 / _MOST_SLOWED, 3) if name == OURS else None,
            unit=_UNIT,
            subject=subject,
            note=_describe(times),
        )
        findings.append(replace(finding, what=f"{name}, steps while it writes"))
    for name in seen:
        finding = loops.compare(name, over=NO_SAVES, target=None, unit=_UNIT, subject=subject)
        findings.append(replace(finding, what=f"{name}, steps, saves and waits"))
    return findings


def run_clean_loop(step: Callable[[], None], settings: Settings) -> dict[str, float]:
    """Train without saving; gives seconds per step."""
    times = [_time(step) for _ in range(settings.steps)]
    return {STEP: float(np.median(times)), LOOP: sum(times) / settings.steps}


def run_loop(
    contender: Contender, step: Callable[[], None], settings: Settings, seen: LoopTimes
) -> dict[str, float]:
    """Train and save; gives the median step while something is written, and the mean of all."""
    began = time.perf_counter()
    times: list[tuple[float, float]] = []  # begin and seconds of each step that saves nothing
    saves: list[float] = []
    watches: list[_Watch] = []
    for number in range(1, settings.steps + 1):
        is_save = number % settings.every == 0
        if is_save:
            seen.waits.append(_time(contender.wait))
        start = time.perf_counter()
        step()
        if not is_save:
            times.append((start, time.perf_counter() - start))
            continue
        contender.save()
        saves.append(time.perf_counter() - start)
        watches.append(_Watch(contender))
    contender.wait()
    loop_s = time.perf_counter() - began
    spans = [watch.span() for watch in watches]
    before = watches[0].began
    clean = [seconds for start, seconds in times if start < before]
    # Of a small state the writing may be over before a step begins: then it slows none.
    beside = [
        seconds
        for start, seconds in times
        if any(first <= start and start + seconds <= last for first, last in spans)
    ] or [seconds for start, seconds in times if start >= before]
    usual = float(np.median(clean)) if clean else settings.step_s
    seen.stalls += [seconds - usual for seconds in saves]
    return {STEP: float(np.median(beside)), LOOP: loop_s / settings.steps}


class _Watch:
    """Notes when a save is written; that costs a thread which sleeps."""

    def __init__(self, contender: Contender) -> None:
        self.began = time.perf_counter()
        self._ended = 0.0
        self._thread = threading.Thread(target=self._run, args=(contender,), name="save-watch")
        self._thread.start()

    def span(self) -> tuple[float, float]:
        self._thread.join()
        return self.began, self._ended

    def _run(self, contender: Contender) -> None:
        contender.wait()
        self._ended = time.perf_counter()


def _describe(times: LoopTimes) -> str:
    return (
        f"stall {np.median(times.stalls):.3f} s, its step less the median clean one "
        f"({min(times.stalls):.3f} to {max(times.stalls):.3f}); then {np.median(times.waits):.2f} "
        "s for the save before to be written"
    )


def _time(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
