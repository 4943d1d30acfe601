"""A run that ends at any operation of its storage is ended by the same command as if it never had.

All kinds of files are compared: weights, metrics, the list of damaged samples, TensorBoard's
events, the stage's record and the summary, and that there is no file more.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import pytest
from support.crash_runs import RunState, read_state, run_session
from support.dead_owners import name_dead_owner
from support.faulty_storage import Fault, FaultyStorage, Mode
from support.memory_store import open_memory_bucket
from support.small_s3 import LostRequests, SmallS3, run_small_s3, set_credentials

from fqgan_dist.errors import FqganError
from fqgan_dist.storage import retries
from fqgan_dist.storage.storage import Storage
from fqgan_dist.waiting import STORAGE_VARIABLE

# Files of records that fail while they are opened leave their folder to the end of the process.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up <TemporaryDirectory .*fqgan-files-:ResourceWarning"
)

_QUICK_STRIDE = 11
"""Always tried: every so many operations; the full tier tries all."""


def _count_operations(root: str) -> int:
    fault = Fault(None)
    run_session(FaultyStorage(root, fault))
    return fault.count


def _crash(root: str, operation: int, mode: Mode) -> None:
    with pytest.raises(FqganError, match="injected failure"):
        run_session(FaultyStorage(root, Fault(operation, mode)))


def _check_crashes(root: str, tmp_path: Path, mode: Mode, *, first: int, stride: int) -> None:
    calm = Storage(f"{root}/calm")
    num_operations = _count_operations(calm.root)
    expected = read_state(calm, tmp_path / "events-of-calm")
    _check_nothing_left(tmp_path / "calm")
    for operation in range(first, num_operations + 1, stride):
        storage = Storage(f"{root}/{operation}")
        _crash(storage.root, operation, mode)
        _leave_parts(tmp_path / str(operation))
        run_session(storage)
        assert read_state(storage, tmp_path / f"events-{operation}") == expected, operation
        _check_nothing_left(tmp_path / str(operation))


def _leave_parts(root: Path) -> None:
    """Leave in each folder of a local root what a killed writer leaves."""
    for folder in (root, *root.rglob("*")):
        if folder.is_dir():
            (folder / f".x.writing-{name_dead_owner()}-00000000").write_bytes(b"part")


def _check_nothing_left(root: Path) -> None:
    """No file of a local root may be there that its readers do not see."""
    seen = {name for name, _ in Storage(root).walk()}
    there = {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}
    assert there == seen


@pytest.mark.parametrize("mode", ["before", "after"])
def test_after_some_operations_on_a_disk(tmp_path: Path, mode: Mode) -> None:
    _check_crashes(str(tmp_path), tmp_path, mode, first=3, stride=_QUICK_STRIDE)


@pytest.mark.parametrize("mode", ["before", "after"])
def test_after_some_operations_in_a_bucket(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_memory_bucket(monkeypatch)
    _check_crashes(bucket.root, tmp_path, mode, first=5, stride=_QUICK_STRIDE)


@pytest.mark.full("every operation; every eleventh is tried always")
@pytest.mark.parametrize("mode", ["before", "after"])
def test_after_every_operation_on_a_disk(tmp_path: Path, mode: Mode) -> None:
    _check_crashes(str(tmp_path), tmp_path, mode, first=1, stride=1)


@pytest.mark.full("every operation; every eleventh is tried always")
@pytest.mark.parametrize("mode", ["before", "after"])
def test_after_every_operation_in_a_bucket(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_memory_bucket(monkeypatch)
    _check_crashes(bucket.root, tmp_path, mode, first=1, stride=1)


LostMode = Literal["this and later", "later, and its answer", "its answer"]


class TestRequests:
    """The same with the requests of a real client, of which one operation makes several."""

    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
        monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.001)
        with run_small_s3() as state:
            set_credentials(monkeypatch, state.endpoint)
            yield state

    def check(
        self, server: SmallS3, tmp_path: Path, mode: LostMode, *, first: int, stride: int
    ) -> None:
        server.lost = counted = LostRequests(None, mode)
        calm = Storage("s3://bucket/calm")
        run_session(calm)
        num_requests = counted.count
        expected = read_state(calm, tmp_path / "events-of-calm")
        for number in range(first, num_requests + 1, stride):
            storage = Storage(f"s3://bucket/{number}")
            server.lost = LostRequests(number, mode)
            if mode == "its answer":
                os.environ[STORAGE_VARIABLE] = "60"
                run_session(storage)
            else:
                os.environ[STORAGE_VARIABLE] = "0"
                with pytest.raises(FqganError, match="cannot be read or written"):
                    run_session(Storage(storage.root))
                server.lost = None
                run_session(storage)
            server.lost = None
            assert read_state(storage, tmp_path / f"events-{number}") == expected, number
        assert server.uploads == {}

    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(STORAGE_VARIABLE, "0")

    @pytest.mark.parametrize("mode", get_args(LostMode))
    def test_after_some_requests(self, server: SmallS3, tmp_path: Path, mode: LostMode) -> None:
        self.check(server, tmp_path, mode, first=7, stride=60)

    @pytest.mark.full("every request; some are tried always")
    @pytest.mark.parametrize("mode", get_args(LostMode))
    def test_after_every_request(self, server: SmallS3, tmp_path: Path, mode: LostMode) -> None:
        self.check(server, tmp_path, mode, first=1, stride=1)


def test_a_record_that_is_missing_would_show(tmp_path: Path) -> None:
    """The comparison sees a lost record, a step that is done twice, and a file too many."""
    storage = Storage(tmp_path / "run")
    run_session(storage)
    states: list[RunState] = [read_state(storage, tmp_path / "0")]
    lines = storage.read_bytes("toy/metrics.jsonl").splitlines(keepends=True)
    storage.write_bytes("toy/metrics.jsonl", b"".join(lines[1:]))
    states.append(read_state(storage, tmp_path / "1"))
    storage.write_bytes("toy/more", b"")
    states.append(read_state(storage, tmp_path / "2"))
    assert all(one != other for one, other in itertools.pairwise(states))
