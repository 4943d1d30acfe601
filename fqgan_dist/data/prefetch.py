"""Loading ahead: results in order, from threads or from spawned processes."""

from __future__ import annotations

import atexit
import gc
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.data.decode_limit import leave_note_in, read_note
from fqgan_dist.data.helper_notes import leave_notes, read_notes
from fqgan_dist.errors import DataError
from fqgan_dist.storage.scratch import ScratchFolder

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
Load = Callable[[KeyT], ValueT]

_PARALLEL_LOADS = 8
"""Tables read at once: where each is a request of 30-60 ms, a window's 8 shards cost one of them,
not eight."""
AHEAD_PER_WORKER = 2
"""Keys that each loader worker holds ready or in work."""


class BoundedCache(Generic[KeyT, ValueT]):
    """The last used values of a function; threads that ask for the same key share one call."""

    def __init__(self, load: Callable[[KeyT], ValueT], capacity: int) -> None:
        """Remember at most `capacity` values of `load`."""
        self._load = load
        self._capacity = capacity
        self._lock = threading.Lock()
        self._values: OrderedDict[KeyT, Future[ValueT]] = OrderedDict()

    def get(self, key: KeyT) -> ValueT:
        """Return the value of a key; an error of `load` is raised, and not remembered."""
        with self._lock:
            future = self._values.get(key)
            is_first = future is None
            if future is None:
                future = self._values[key] = Future()
                while len(self._values) > self._capacity:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
        if is_first:
            self._fill(key, future)
        return future.result()

    def get_many(self, keys: Iterable[KeyT]) -> dict[KeyT, ValueT]:
        """Return the values of keys; those that are missing are loaded side by side.

        More keys than the capacity are given all the same, but not all of them remembered.
        """
        wanted = list(dict.fromkeys(keys))
        with self._lock:
            missing = [key for key in wanted if key not in self._values]
        if len(missing) < 2:
            return {key: self.get(key) for key in wanted}
        with ThreadPoolExecutor(min(len(missing), _PARALLEL_LOADS)) as pool:
            return dict(zip(wanted, pool.map(self.get, wanted), strict=True))

    def _fill(self, key: KeyT, future: Future[ValueT]) -> None:
        try:
            future.set_result(self._load(key))
        except BaseException as error:  # waiting threads must wake whatever happened
            with self._lock:
                self._values.pop(key, None)
            future.set_exception(error)
            raise


def load_in_threads(
    load: Callable[[KeyT], ValueT], keys: Iterable[KeyT], *, threads: int, ahead: int
) -> Generator[ValueT, None, None]:
    """Yield `load(key)` for each key in order, working on up to `ahead` later ones meanwhile.

    Reading and Pillow's decoding and resizing release the interpreter lock, so threads do overlap
    with training. Closing the generator stops them.
    """
    pending: deque[Future[ValueT]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        try:
            for key in keys:
                # Submitted one by one as results are taken: keys may be endless, and memory holds
                # `ahead` results.
                pending.append(pool.submit(load, key))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def load_in_processes(
    build: Callable[[], Load[Any, ValueT]], keys: Iterable[Any], *, workers: int
) -> Generator[ValueT, None, None]:
    """Yield `build()(key)` for each key in order, computed by spawned loader workers.

    Each works at most two keys ahead. Closing the generator ends them.

    Args:
        build: makes the function inside each worker; picklable. Workers are spawned, since
            S3 clients and CUDA do not survive a fork.
        keys: picklable keys; may be endless.
        workers: number of processes.

    Raises:
        DataError: a worker ended itself, since an image takes forever to decode.
    """
    with ScratchFolder("loader") as folder:
        try:
            yield from _load_by_workers(build, keys, workers=workers, notes=Path(folder))
        except RuntimeError:  # as DataLoader tells that a worker has gone
            if (text := read_note(Path(folder))) is not None:
                raise DataError(text) from None
            raise


def _load_by_workers(
    build: Callable[[], Load[Any, ValueT]], keys: Iterable[Any], *, workers: int, notes: Path
) -> Generator[ValueT, None, None]:
    loader = DataLoader(
        _BuiltInWorker(build),
        # DataLoader gives results in the order of its keys, whichever worker is the first: the
        # stream does not depend on their number or speed.
        sampler=_Keys(keys),
        # A key is a micro-batch already: DataLoader shall neither collect keys nor rebuild results.
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=AHEAD_PER_WORKER,
        multiprocessing_context="spawn",
        worker_init_fn=partial(_begin_worker, notes),
    )
    # DataLoader's iterator ends its workers when it is freed, and has no other public way. This
    # frame holds the only reference, which goes with the frame when the generator is closed.
    with ACTIVITY.helped_by(partial(read_notes, notes)):
        yield from loader


def _begin_worker(notes: Path, _: int) -> None:
    """Prepare a worker for its work, and for its end by itself or by the limit on decoding."""
    # What was imported stays: looking for garbage in it takes 5 % of a worker's time.
    gc.freeze()
    leave_note_in(notes)
    leave_notes(notes)
    # When all is done, before the interpreter takes itself apart: the thread by which torch sends
    # batches may be within C++ then, and the process aborts ("terminate called without an active
    # exception"), which DataLoader reports as an error of the loader that was just closed.
    atexit.register(os._exit, 0)


class _BuiltInWorker(Dataset[ValueT]):
    def __init__(self, build: Callable[[], Load[Any, ValueT]]) -> None:
        self._build = build
        self._load: Load[Any, ValueT] | None = None

    def __getitem__(self, index: Any) -> ValueT:
        if self._load is None:
            self._load = self._build()
        return self._load(index)


class _Keys(Sampler[Any]):
    def __init__(self, keys: Iterable[Any]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)


def _as_it_is(value: ValueT) -> ValueT:  # no lambda: spawned workers get it pickled
    return value
