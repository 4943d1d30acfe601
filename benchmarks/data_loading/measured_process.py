"""A loader in a process of its own, whose CPU time, workers included, is read from outside.

A loader that works ahead has work behind it when a measurement begins and ahead of it when it ends.
So each measurement draws batches and then waits until the loader rests: it starts and ends with
full queues, and the CPU time between is that of the batches drawn.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (B, 3, H, W) uint8 and labels (B,) int64."""
Build = Callable[..., Iterator[Batch]]

_PRELOADED = ("fqgan_dist.data.loader", "torchvision", "webdataset", "streaming", "litdata")
"""Imported once, in the server that the processes are forked from; what is missing is ignored."""
_PROBE_S = 0.04
_RESTING_LOAD = 0.08
"""Share of a core that a resting loader may use: some poll."""
_RESTING_PROBES = 2
_LONGEST_REST_S = 3.0
_STOP_S = 3.0


class MeasuredProcess:
    """Runs `build(*arguments)`, an endless loader, in a new process with one thread for torch."""

    def __init__(self, build: Build, *arguments: Any) -> None:
        """Start the process; `wait_until_ready` waits for its first batch."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments))
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the loader's first batch and give it."""
        return self._receive()

    def measure(self, num_batches: int) -> float:
        """Draw batches and give the CPU seconds per batch of the process and all its children."""
        wait_for_rest(self._cpu_seconds)
        start = self._cpu_seconds()
        self._connection.send(num_batches)
        self._receive()
        wait_for_rest(self._cpu_seconds)
        return (self._cpu_seconds() - start) / num_batches

    def ask_to_stop(self) -> None:
        """Let the process end, without waiting for it."""
        with suppress(OSError):
            self._connection.send(None)

    def close(self) -> None:
        """End the process and what it has started."""
        children = self._tree()[1:]
        self.ask_to_stop()
        self._process.join(_STOP_S)
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError as error:
            raise RuntimeError("the process of a loader ended unexpectedly") from error
        if isinstance(answer, str):
            raise RuntimeError(f"a loader failed:\n{answer}")
        return answer

    def _cpu_seconds(self) -> float:
        return sum(read_cpu_seconds(process.pid) for process in self._tree())

    def _tree(self) -> list[psutil.Process]:
        assert self._process.pid is not None, "it was started"
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def read_cpu_seconds(pid: int) -> float:
    """Read the CPU time of all threads of a process, to the nanosecond; 0 if it has ended."""
    try:
        # What clock_getcpuclockid(3) computes; /proc counts in hundredths of a second.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def wait_for_rest(read_seconds: Callable[[], float]) -> None:
    """Wait until a clock of CPU time nearly stands still: nothing is being loaded ahead."""
    deadline = time.monotonic() + _LONGEST_REST_S
    resting, before = 0, read_seconds()
    while resting < _RESTING_PROBES and time.monotonic() < deadline:
        time.sleep(_PROBE_S)
        now = read_seconds()
        resting = resting + 1 if now - before < _RESTING_LOAD * _PROBE_S else 0
        before = now


def _serve(connection: Connection, build: Build, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        stream = build(*arguments)
        images, labels = next(stream)
        connection.send((images.numpy(), labels.numpy()))
        while (count := connection.recv()) is not None:
            for _ in range(count):
                next(stream)
            connection.send(count)
    except (EOFError, KeyboardInterrupt):
        return  # the benchmark has ended
    except Exception:  # noqa: BLE001  the benchmark tells what went wrong, with the traceback
        with suppress(OSError):
            connection.send(traceback.format_exc(limit=-5))
