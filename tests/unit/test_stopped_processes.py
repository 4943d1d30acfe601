"""A process that is stopped is ended, with its stacks, and no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from support.waiting import wait_until

from fqgan_dist.stopped_processes import (
    ProcessId,
    describe_stacks,
    end_process,
    endable_process,
    is_here,
    read_state,
)

PROGRAM = """
import ctypes, json, sys, time
from dataclasses import asdict
from fqgan_dist.stopped_processes import endable_process

def wait_for_ever(process):
    print(json.dumps(asdict(process)), flush=True)
    if "lock" in sys.argv:
        ctypes.PyDLL(None).sleep(3600)  # which keeps the interpreter's lock
    while True:
        time.sleep(0.01)

with endable_process() as process:
    wait_for_ever(process)
"""


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, getattr(request, "param", "")],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def read_id(child: subprocess.Popen[str]) -> ProcessId:
    assert child.stdout is not None
    return ProcessId(**json.loads(child.stdout.readline()))


def test_a_stopped_process_is_ended_and_leaves_its_stacks(child: subprocess.Popen[str]) -> None:
    process = read_id(child)
    os.kill(child.pid, signal.SIGSTOP)
    wait_until(lambda: read_state(child.pid) == "T")
    stacks = end_process(process)
    assert stacks is not None
    assert "in wait_for_ever" in stacks
    assert child.wait() == -signal.SIGUSR2
    assert end_process(process) is None


@pytest.mark.parametrize("child", ["lock"], indirect=True)
def test_a_process_whose_threads_cannot_run_is_ended_alike(child: subprocess.Popen[str]) -> None:
    process = read_id(child)
    stacks = end_process(process)
    assert stacks is not None
    assert "in wait_for_ever" in stacks
    assert child.wait() == -signal.SIGUSR2


@pytest.mark.parametrize("other", [{"started": 1}, {"host": "another"}])
def test_a_process_that_is_another_by_now_stays(
    child: subprocess.Popen[str], other: dict[str, int | str]
) -> None:
    process = read_id(child)
    assert end_process(replace(process, **other)) is None
    assert child.poll() is None


def test_this_process_is_itself_and_knows_its_stacks() -> None:
    with endable_process(node="n") as process:
        assert is_here(process)
        assert (process.pid, process.node) == (os.getpid(), "n")
        assert ProcessId(**asdict(process)) == process
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="the other")
    thread.start()
    try:
        assert "thread the other:\n  File" in describe_stacks()
    finally:
        release.set()
        thread.join()
