"""Files of every kind, damaged at random: they are read, or an error of ours says what is wrong."""

from __future__ import annotations

import mmap
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fuzz_targets import TARGETS
from support.fuzzing import Tally, Target, run_cases

from fqgan_dist.errors import DataError

_FEW, _MANY = 8, 1500

each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def feed(target: Target, seeds: range) -> Tally:
    tally = run_cases(target, seeds)
    assert tally.num_cases == len(target.examples) + len(seeds)
    assert not tally.findings, "\n".join(map(str, [tally, *tally.findings[:20]]))
    return tally


@each_target
def test_a_damaged_file_is_read_or_refused(target: Target) -> None:
    feed(target, range(_FEW))


@pytest.mark.full("more seeds; a few of each reader are tried always")
@each_target
def test_many_damaged_files_are_read_or_refused(
    target: Target, record_property: Callable[[str, object], None]
) -> None:
    record_property("summary", f"fuzzing: {feed(target, range(_FEW, _FEW + _MANY))}")


_KEPT: list[mmap.mmap] = []


def _read(data: bytes, folder: Path) -> None:
    match data:
        case b"refused":
            raise DataError("not of this kind; expected another: make it again")
        case b"documented":
            raise FileNotFoundError
        case b"ours":
            raise KeyError(data)
        case b"silent":
            raise DataError("")
        case b"dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case b"grows":
            # Not by malloc, which may have as much to spare from tests before.
            memory = mmap.mmap(-1, 2**26)
            for start in range(0, len(memory), mmap.PAGESIZE):
                memory[start] = 1
            _KEPT.append(memory)  # the kernel may forget a peak that lasts a moment
        case b"slow":
            while True:
                sum(range(10**6))


def _make_target(data: bytes, **options: Any) -> Target:
    return Target(data.decode(), lambda: [b""], lambda *_: data, _read, **options)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"ours", r"KeyError \(.*\) at .*test_fuzzing\.py"),
        (b"silent", "a message of 0 characters"),
        (b"dies", "died of it: signal SIGKILL"),
        (b"grows", "64 MiB; at most 32"),
        (b"slow", "died of it: nothing for 0.3 s"),
    ],
)
def test_a_fault_is_found_and_the_next_case_tried(data: bytes, what: str) -> None:
    tally = run_cases(_make_target(data, max_bytes=2**25, max_wall_s=0.3), range(2))
    assert [finding.seed for finding in tally.findings] == [0, 1]
    for finding in tally.findings:
        assert re.search(what, finding.what), finding.what


def test_time_of_processors_is_measured() -> None:
    target = Target("t", lambda: [b""], lambda *_: b"x", lambda *_: sum(range(10**6)))
    tally = run_cases(target, range(1))
    assert tally.max_cpu_s > 0.001


@pytest.mark.parametrize("data", [b"refused", b"documented"])
def test_what_may_be_raised_is_no_fault(data: bytes) -> None:
    target = _make_target(data, documented=(FileNotFoundError,))
    tally = run_cases(target, range(3))
    assert (tally.num_cases, tally.num_read, tally.findings) == (4, 1, [])


def test_a_valid_file_that_is_refused_is_a_fault() -> None:
    target = Target("t", lambda: [b"refused"], lambda data, *_: data, _read)
    assert [finding.seed for finding in run_cases(target, range(2)).findings] == [-1]


def test_a_case_is_the_same_each_time() -> None:
    for target in TARGETS:
        assert target.case(0) == target.case(0), target.name
