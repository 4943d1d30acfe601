from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.observers import RecordingObserver

from fqgan_dist.chunks import ChunkWork, find_pending, process_pending, run_in_processes
from fqgan_dist.errors import DataError


class TouchWork:
    """Makes a file per chunk."""

    description = "touching"
    unit = "bytes"
    local_reason = None

    def __init__(self, root: Path, count: int, *, wrong: int | None = None) -> None:
        self.root, self.count, self.wrong = root, count, wrong

    def chunks(self) -> range:
        return range(self.count)

    def size(self, chunk: int) -> int:
        return 10 * (chunk + 1)

    def is_done(self, chunk: int) -> bool:
        return (self.root / str(chunk)).exists()

    def process(self, chunk: int) -> None:
        if chunk == self.wrong:
            raise DataError(f"chunk {chunk} is wrong")
        (self.root / str(chunk)).touch(exist_ok=False)

    def set_up_process(self, role: str, number: int) -> None:
        raise AssertionError(f"{role} {number}: no process is started for one worker")


def test_one_worker_is_this_process_and_does_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    work = TouchWork(tmp_path, 3)
    assert find_pending(work) == [0, 2]
    observer = RecordingObserver()
    run_in_processes(work, observer=observer)
    assert observer.lines() == ["touching: 60/60 bytes"]
    (bar,) = observer.bars
    # What was done before is no throughput.
    assert bar.state().skipped == 20
    assert bar.advanced == [10, 30]
    assert find_pending(work) == []


def test_the_observer_is_told_at_each_chunk_what_its_executor_has_to_say(tmp_path: Path) -> None:
    (tmp_path / "0").touch()
    actors = 0

    def execute(work: ChunkWork, pending: Sequence[int]) -> Iterator[int]:
        nonlocal actors
        for chunk in reversed(pending):
            work.process(chunk)
            actors += 1
            yield chunk

    observer = RecordingObserver()
    work = TouchWork(tmp_path, 4)
    process_pending(work, execute, observer, fields=lambda: {"actors": actors})
    (bar,) = observer.bars
    assert bar.advanced == [40, 30, 20]
    assert bar.state().fields == {"actors": 3}
    assert find_pending(work) == []


def test_a_chunk_that_fails_is_not_counted(tmp_path: Path) -> None:
    observer = RecordingObserver()
    with pytest.raises(DataError, match="chunk 1 is wrong"):
        run_in_processes(TouchWork(tmp_path, 3, wrong=1), observer=observer)
    assert observer.lines() == ["touching: 10/60 bytes"]


def test_one_chunk_starts_no_process(tmp_path: Path) -> None:
    run_in_processes(TouchWork(tmp_path, 1), workers=8)
    assert (tmp_path / "0").exists()


def test_no_chunk_is_no_work(tmp_path: Path) -> None:
    run_in_processes(TouchWork(tmp_path, 0), workers=8)


def test_the_first_error_ends_the_work(tmp_path: Path) -> None:
    work = TouchWork(tmp_path, 4, wrong=1)
    with pytest.raises(DataError, match="chunk 1 is wrong"):
        run_in_processes(work)
    assert find_pending(work) == [1, 2, 3]


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers 0: expected at least 1"):
        run_in_processes(TouchWork(tmp_path, 1), workers=0)
