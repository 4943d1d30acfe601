"""How long a save stops training, and how fast it is written, with no training beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial

import numpy as np

from benchmarks.checkpointing.contenders import (
    COPY,
    DCP_ASYNC,
    OURS,
    TORCH,
    TORCH_UNSYNCED,
    Contender,
)
from benchmarks.checkpointing.settings import Settings
from benchmarks.paired import Finding, Rounds, run_measures

STALL, WRITING = "stall", "writing"
_BEHIND = (DCP_ASYNC, OURS)
"""Contenders that write after `save` has returned."""
# Times of ours over those of the other; a speed-up is their inverse.
_MOST_OF_COPY, _MOST_OF_TORCH, _MOST_OF_DCP_ASYNC = 1.5, 1 / 8, 0.8
_WRITING_TARGET = 1.8
_UNIT = "GB/s"


def measure(
    place: str, contenders: Mapping[str, Contender], gigabytes: float, settings: Settings
) -> list[Finding]:
    """Compare stalls and rates of writing of a state of so many GB."""
    measures = run_measures(
        {
            name: partial(_time, name, contender, gigabytes)
            for name, contender in contenders.items()
        },
        control=OURS,
        rounds=settings.rounds,
        warmup=0,
    )
    return [
        *_judge_stalls(f"{place}: {STALL}", measures[STALL], gigabytes),
        *_judge_writing(f"{place}: {WRITING}", measures[WRITING], gigabytes),
    ]


def _time(name: str, contender: Contender, gigabytes: float) -> dict[str, float]:
    # What others have left to the disk, such as space that they freed, is not of this save.
    os.sync()
    began = time.perf_counter()
    contender.save()
    returned = time.perf_counter()
    contender.wait()
    ended = time.perf_counter()
    costs = {STALL: (returned - began) / gigabytes}
    if name != COPY:
        written_s = ended - returned if name in _BEHIND else returned - began
        costs[WRITING] = written_s / gigabytes
    return costs


def _judge_stalls(subject: str, rounds: Rounds, gigabytes: float) -> list[Finding]:
    limits = {COPY: _MOST_OF_COPY, TORCH: _MOST_OF_TORCH, DCP_ASYNC: _MOST_OF_DCP_ASYNC}
    ours = describe_seconds(rounds, OURS, gigabytes)
    return [
        *show_others(subject, rounds, gigabytes),
        *(
            rounds.compare(
                OURS,
                over=name,
                target=round(1 / limit, 3),
                unit=_UNIT,
                subject=subject,
                note=f"{ours}; at most {limit:g}x the stall of {name}",
            )
            for name, limit in limits.items()
        ),
    ]


def _judge_writing(subject: str, rounds: Rounds, gigabytes: float) -> list[Finding]:
    targets = {TORCH: _WRITING_TARGET, TORCH_UNSYNCED: None, DCP_ASYNC: None}
    note = f"{describe_seconds(rounds, OURS, gigabytes)} from the end of save to that of wait"
    return [
        *show_others(subject, rounds, gigabytes),
        *(
            rounds.compare(
                OURS,
                over=name,
                target=target,
                unit=_UNIT,
                subject=subject,
                note="" if target is None else note,
            )
            for name, target in targets.items()
        ),
    ]


def show_others(subject: str, rounds: Rounds, gigabytes: float) -> list[Finding]:
    """Give the rates of all but ours, with the seconds that they are of."""
    return [
        rounds.show(
            name, unit=_UNIT, subject=subject, note=describe_seconds(rounds, name, gigabytes)
        )
        for name in rounds.costs
        if name != OURS
    ]


def describe_seconds(rounds: Rounds, name: str, gigabytes: float) -> str:
    """Write the median time of a contender for the whole state, and its range."""
    seconds = np.asarray(rounds.costs[name]) * gigabytes
    return f"{np.median(seconds):.3f} s ({seconds.min():.3f} to {seconds.max():.3f})"
