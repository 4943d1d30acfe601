from __future__ import annotations

import itertools
import multiprocessing
import operator
import threading
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loader_workers import NotesItsEnd
from support.waiting import wait_until

from fqgan_dist.data.prefetch import BoundedCache, load_in_processes, load_in_threads


@given(st.integers(0, 30), st.integers(1, 4), st.integers(0, 9))
def test_threads_keep_the_order(count: int, threads: int, ahead: int) -> None:
    found = list(load_in_threads(lambda key: key * key, range(count), threads=threads, ahead=ahead))
    assert found == [key * key for key in range(count)]


def test_threads_work_ahead_but_not_further() -> None:
    asked: list[int] = []

    def keys() -> itertools.count[int]:
        return itertools.count()

    def load(key: int) -> int:
        asked.append(key)
        return key

    stream = load_in_threads(load, keys(), threads=1, ahead=3)
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert set(asked) <= {0, 1, 2, 3}


def test_background_loads_while_the_consumer_is_busy() -> None:
    second_was_loaded = threading.Event()

    def load(key: int) -> int:
        if key == 1:
            second_was_loaded.set()
        return key

    stream = load_in_threads(load, range(3), threads=1, ahead=1)
    assert next(stream) == 0
    assert second_was_loaded.wait(30)
    assert list(stream) == [1, 2]


def test_error_comes_where_its_result_would() -> None:
    def load(key: int) -> int:
        if key == 2:
            raise ValueError("damaged")
        return key

    stream = load_in_threads(load, range(9), threads=2, ahead=4)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(stream)


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    stream = load_in_threads(lambda key: key, itertools.count(), threads=3, ahead=5)
    next(stream)
    assert threading.active_count() > before
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (2, 4), (4, 3)])
def test_a_slow_consumer_bounds_what_is_held(threads: int, ahead: int) -> None:
    lock = threading.Lock()
    counts = Counter(started=0, taken=0, most=0)

    def load(key: int) -> int:
        with lock:
            counts["started"] += 1
            counts["most"] = max(counts["most"], counts["started"] - counts["taken"])
        return key

    def is_full() -> bool:
        return counts["started"] - counts["taken"] == ahead + 1

    with closing(load_in_threads(load, itertools.count(), threads=threads, ahead=ahead)) as stream:
        for _ in range(50):
            next(stream)
            wait_until(is_full)
            counts["taken"] += 1
    assert counts["most"] == ahead + 1


def test_processes_work_ahead_but_not_further() -> None:
    asked = itertools.count()
    keys = iter(lambda: next(asked), None)
    with closing(load_in_processes(partial(partial, operator.neg), keys, workers=2)) as stream:
        assert [next(stream) for _ in range(5)] == [0, -1, -2, -3, -4]
        # Two batches for each worker, beside the five taken, however long the consumer takes.
        assert next(asked) == 5 + 2 * 2
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_processes_keep_the_order() -> None:
    # Calling `build` in the worker gives the function k -> 3 k; both can be pickled.
    build = partial(partial, operator.mul, 3)
    assert list(load_in_processes(build, range(7), workers=2)) == [3 * k for k in range(7)]


def test_workers_leave_before_the_interpreter_ends(tmp_path: Path) -> None:
    # Else a thread of torch's that is within C++ aborts some of them: in 2 of 32 runs, under load.
    build = NotesItsEnd(tmp_path / "ended")
    assert list(load_in_processes(build, range(3), workers=1)) == [0, -1, -2]
    assert multiprocessing.active_children() == []
    assert not build.path.exists()


def test_cache_keeps_the_last_used() -> None:
    asked: list[int] = []

    def load(key: int) -> int:
        asked.append(key)
        return -key

    cache = BoundedCache(load, 2)
    assert [cache.get(key) for key in (1, 2, 1, 3, 1, 2)] == [-1, -2, -1, -3, -1, -2]
    assert asked == [1, 2, 3, 2]


def test_cache_calls_once_for_threads_that_ask_at_once() -> None:
    calls: list[int] = []
    first_is_in, others_wait = threading.Event(), threading.Barrier(5)

    def load(key: int) -> int:
        calls.append(key)
        first_is_in.wait(30)
        return key

    cache = BoundedCache(load, 2)
    found: list[int] = []

    def ask() -> None:
        others_wait.wait(30)
        found.append(cache.get(7))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    others_wait.wait(30)
    first_is_in.set()
    for thread in threads:
        thread.join()
    assert found == [7] * 4
    assert calls == [7]


def test_cache_loads_several_side_by_side_and_each_once() -> None:
    calls: list[int] = []
    both_are_in = threading.Barrier(2)

    def load(key: int) -> int:
        calls.append(key)
        both_are_in.wait(30)
        return -key

    cache = BoundedCache(load, 4)
    assert cache.get_many([1, 2, 1, 2]) == {1: -1, 2: -2}
    assert cache.get_many(iter([2, 1])) == {2: -2, 1: -1}
    assert sorted(calls) == [1, 2]


def test_cache_gives_more_values_than_it_keeps() -> None:
    cache = BoundedCache(operator.neg, 2)
    assert cache.get_many(range(20)) == {key: -key for key in range(20)}


def test_cache_forgets_errors() -> None:
    answers = iter([OSError("gone"), None])

    def load(key: int) -> int:
        answer = next(answers)
        if answer is not None:
            raise answer
        return key

    cache = BoundedCache(load, 2)
    with pytest.raises(OSError, match="gone"):
        cache.get(1)
    assert cache.get(1) == 1
