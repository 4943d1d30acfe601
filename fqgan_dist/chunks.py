"""Work in independent chunks, the loop over those that are left, and processes that do them.

Processing a chunk is a pure function of storage and the chunk's number, and commits its output
once; so any process may process any chunk, again after a kill, in any order (design.md section 1).
Who processes them is the loop's `Execute`: this process or others of this machine, which are here,
or the actors of a Ray cluster (orchestration/pools.py).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from fqgan_dist.errors import ClusterError
from fqgan_dist.telemetry.observer import SILENT, Observer
from fqgan_dist.telemetry.summary import Metric

# Threads that ask a remote storage, some 20 ms each, which of thousands of chunks are there.
_CONCURRENT_CHECKS = 32


class ChunkWork(Protocol):
    """A set of independent chunks.

    Picklable: it travels to the processes that work, each of which loads what it needs at its first
    `process` (see `ProcessLocalCaches`).
    """

    @property
    def description(self) -> str:
        """What is being done, for progress."""
        ...

    @property
    def unit(self) -> str:
        """What `size` counts, in the plural."""
        ...

    @property
    def local_reason(self) -> str | None:
        """Why it must be done on this machine, where its inputs are; None: it may be anywhere.

        It also says what would let other machines do it.
        """
        ...

    def chunks(self) -> Sequence[int]:
        """Return the ids of all chunks."""
        ...

    def size(self, chunk: int) -> int:
        """Return how many units a chunk holds."""
        ...

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's output is committed; may be called from several threads at once."""
        ...

    def process(self, chunk: int) -> None:
        """Make and commit the chunk's output, whole or not at all.

        Two processes may do it at once (one was given up too early): both commit the same bytes.

        Raises:
            FqganError: an input is wrong; it would be so in any other process.
        """
        ...

    def set_up_process(self, role: str, number: int) -> None:
        """Set up a fresh process, logging above all; it is number `number` of its role."""
        ...


RunChunks = Callable[[ChunkWork], None]
"""Processes every chunk that is not done."""

Execute = Callable[[ChunkWork, Sequence[int]], Iterator[int]]
"""Processes chunks of some work, and gives each when its output is committed."""


class ProcessLocalCaches:
    """Base of objects that travel without their `cached_property` values.

    What is loaded lazily, networks above all, stays in the process that loaded it.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if not isinstance(getattr(type(self), name, None), functools.cached_property)
        }


def find_pending(work: ChunkWork) -> list[int]:
    """List the chunks whose output is not committed, in order."""
    chunks = work.chunks()
    with ThreadPoolExecutor(_CONCURRENT_CHECKS) as threads:
        done = list(threads.map(work.is_done, chunks))
    return [chunk for chunk, is_done in zip(chunks, done, strict=True) if not is_done]


def process_pending(
    work: ChunkWork,
    execute: Execute,
    observer: Observer,
    *,
    fields: Callable[[], Mapping[str, Metric]] = dict,
) -> None:
    """Process every chunk that is not done by `execute`, and tell the observer of each.

    `fields` gives what else the observer is told at each chunk. It raises what `execute` raises.
    """
    pending = find_pending(work)
    total = sum(work.size(chunk) for chunk in work.chunks())
    with observer.track(total, work.description, work.unit) as bar:
        bar.skip(total - sum(work.size(chunk) for chunk in pending))
        for chunk in execute(work, pending):
            bar.advance(work.size(chunk), **fields())


def run_in_processes(work: ChunkWork, *, workers: int = 1, observer: Observer = SILENT) -> None:
    """Process every chunk that is not done in at most `workers` processes of this machine.

    With one worker, or one chunk, that is this process. Others are spawned, so `work` and its
    module must be importable; they die with this process, however it ends.

    Raises:
        ValueError: `workers` is not positive.
        FqganError: the first that a chunk raised; the others are stopped at once.
        ClusterError: a process was killed.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    process_pending(work, functools.partial(_process_all, workers=workers), observer)


def _process_all(work: ChunkWork, pending: Sequence[int], *, workers: int) -> Iterator[int]:
    workers = min(workers, len(pending))
    if workers <= 1:
        for chunk in pending:
            work.process(chunk)
            yield chunk
        return
    try:
        with _spawn_workers(work, workers) as executor:
            futures = {executor.submit(_process, chunk): chunk for chunk in pending}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
    except BrokenProcessPool as error:
        raise ClusterError(
            f"{work.description}: one of {workers} processes died, most often killed by the kernel "
            "as memory was short (`dmesg` tells) - expected that all live until the end - use "
            "fewer workers or smaller shards; what is finished stays, and the same command goes on"
        ) from error


@contextmanager
def _spawn_workers(work: ChunkWork, workers: int) -> Iterator[ProcessPoolExecutor]:
    # They are killed if the block fails, as chunks may take minutes.
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        workers,
        # Not forked: threads, and the clients of object stores, do not survive that.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_set_up_worker,
        initargs=(work,),
    )
    try:
        yield executor
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


# What a spawned process works on.
_worker_work: ChunkWork | None = None


def _set_up_worker(work: ChunkWork) -> None:
    global _worker_work
    # Ctrl-C reaches the whole group: the parent alone decides, and kills us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    work.set_up_process("worker", os.getpid())
    _worker_work = work


def _die_with_parent() -> None:
    # A worker holds both ends of its own queue, so it would never see that the parent is gone.
    parent = multiprocessing.parent_process()
    assert parent is not None, "only spawned processes wait for their parent"
    parent.join()
    os._exit(1)


def _process(chunk: int) -> None:
    assert _worker_work is not None, "a worker is set up before its first chunk"
    _worker_work.process(chunk)
