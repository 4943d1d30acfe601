"""How long a restart reads: verified tensors from our files, beside reading these files plainly.

`warm`: all files are in the page cache; `cold`: none is, though a virtual disk's host may have them
in its own. Both are the same for all contestants.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.checkpointing.contenders import OURS, TORCH, Contender, Ours, TorchSave, sync
from benchmarks.checkpointing.saving import describe_seconds, show_others
from benchmarks.checkpointing.settings import Settings
from benchmarks.paired import Finding, Rounds, WrongResultError, run_rounds

RAW = "raw read"
RAW_NEW = "raw read, new memory"
LOAD = "torch.load"
_MOST_OF_RAW = 1.3
_UNIT = "GB/s"


def measure(
    place: str,
    contenders: Mapping[str, Contender],
    gigabytes: float,
    settings: Settings,
    *,
    has_cold: bool,
) -> list[Finding]:
    """Compare restoring with reading the same bytes; cold too where files are on a disk."""
    ours, peer = contenders[OURS], contenders[TORCH]
    assert isinstance(ours, Ours), "it is made as such"
    assert isinstance(peer, TorchSave), "it is made as such"
    files = ours.files()
    buffer = np.zeros(sum(path.stat().st_size for path in files), np.uint8)
    readers: dict[str, Callable[[], object]] = {
        RAW: partial(read_raw, files, buffer),
        RAW_NEW: lambda: read_raw(files, np.empty(len(buffer), np.uint8)),
        LOAD: peer.read_back,
        OURS: ours.read_back,
    }
    findings: list[Finding] = []
    for state in ("warm", "cold") if has_cold else ("warm",):
        dropped = [*files, peer.path] if state == "cold" else []
        contestants = {
            name: partial(_time, read, dropped, gigabytes) for name, read in readers.items()
        }
        rounds = run_rounds(contestants, control=RAW, rounds=settings.rounds, warmup=0)
        findings += _judge(f"{place}: restore, {state}", rounds, gigabytes)
    return findings


def read_raw(files: Sequence[Path], buffer: np.ndarray) -> None:
    """Read files one after the other into a buffer as large as they are.

    Raises:
        WrongResultError: they are shorter.
    """
    view, position = buffer.data, 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(view[position:]):
                position += count
    if position != len(view):
        raise WrongResultError(f"{RAW}: {position} of {len(view)} bytes")


def drop_from_cache(path: Path) -> None:
    """Let the page cache forget a file; only pages that are on the disk can go."""
    sync(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _time(read: Callable[[], object], dropped: Sequence[Path], gigabytes: float) -> float:
    for path in dropped:
        drop_from_cache(path)
    start = time.perf_counter()
    found = read()
    seconds = time.perf_counter() - start
    del found  # its memory goes back outside of the timed part
    return seconds / gigabytes


def _judge(subject: str, rounds: Rounds, gigabytes: float) -> list[Finding]:
    ours = describe_seconds(rounds, OURS, gigabytes)
    targets = {RAW: _MOST_OF_RAW, RAW_NEW: None, LOAD: None}
    return [
        *show_others(subject, rounds, gigabytes),
        *(
            rounds.compare(
                OURS,
                over=name,
                target=None if limit is None else round(1 / limit, 3),
                unit=_UNIT,
                subject=subject,
                note="" if limit is None else f"{ours}; at most {limit:g}x the time of {name}",
            )
            for name, limit in targets.items()
        ),
    ]
