from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.chunks import find_pending, run_in_processes
from fqgan_dist.errors import DataError


class TouchWork:
    """Makes a file per chunk."""

    description = "touching"
    unit = "bytes"

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
    told: list[tuple[str, int, int]] = []
    run_in_processes(work, progress=lambda *state: told.append(state))
    # The first call tells what was done before: it is no throughput.
    assert told == [("touching", 20, 60), ("touching", 30, 60), ("touching", 60, 60)]
    assert find_pending(work) == []


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
