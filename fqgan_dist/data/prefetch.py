"""Loading ahead: results in order, from threads or from spawned processes."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
Load = Callable[[KeyT], ValueT]


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
) -> Iterator[ValueT]:
    """Yield `load(key)` for each key in order, working on up to `ahead` later ones meanwhile.

    Reading and Pillow's decoding and resizing release the interpreter lock, so threads do overlap
    with training. Closing the generator stops them.
    """
    pending: deque[Future[ValueT]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        try:
            for key in keys:
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
) -> Iterator[ValueT]:
    """Yield `build()(key)` for each key in order, computed by spawned loader workers.

    Args:
        build: makes the function inside each worker; picklable. Workers are spawned, since
            S3 clients and CUDA do not survive a fork.
        keys: picklable keys; may be endless.
        workers: number of processes.
    """
    loader = DataLoader(
        _BuiltInWorker(build),
        sampler=_Keys(keys),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context="spawn",
    )
    yield from loader


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


def _as_it_is(value: ValueT) -> ValueT:
    return value
