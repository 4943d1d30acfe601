from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from support.slow_storage import GO, StrangeStorage, WaitingStorage

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.errors import DataError, LossError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training import writer_process
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.checkpoint_files import FileImage, HostStaging
from fqgan_dist.training.writer_process import WriterHere, WriterProcess
from fqgan_dist.waiting import WAITS

T = TypeVar("T")


@pytest.fixture
def writer() -> Iterator[WriterProcess]:
    writer = WriterProcess()
    yield writer
    writer.close()


def _images(*values: float, size: int = 1000) -> list[FileImage]:
    parts = {f"p{i}": {"x": torch.full((size,), value)} for i, value in enumerate(values)}
    return HostStaging(0).copy(parts)


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _wait_for(condition: Callable[[], T]) -> T:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _child_pids() -> set[int]:
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    pids = set()
    for tasks in children.parent.parent.glob("*/children"):
        pids |= set(map(int, tasks.read_text().split()))
    return pids


def test_files_and_hashes_are_those_of_a_thread(tmp_path: Path, writer: WriterProcess) -> None:
    storage = Storage(tmp_path)
    images = _images(1, 2, 3)
    assert writer.write(storage, "apart", images) == WriterHere().write(storage, "here", images)
    assert _read(tmp_path / "apart") == _read(tmp_path / "here")


def test_memory_is_refilled_given_up_and_new(tmp_path: Path, writer: WriterProcess) -> None:
    storage, staging = Storage(tmp_path), HostStaging(0)
    for step, sizes in enumerate([(5, 6), (5, 6), (5, 9), (9,), (4, 9, 5)]):
        parts = {f"p{i}": {"x": torch.full((n,), step + i / 4)} for i, n in enumerate(sizes)}
        images = staging.copy(parts)
        writer.write(storage, f"apart-{step}", images)
        WriterHere().write(storage, f"here-{step}", images)
        assert _read(tmp_path / f"apart-{step}") == _read(tmp_path / f"here-{step}")


def test_an_attempt_saves_through_it(tmp_path: Path) -> None:
    store = CheckpointStore(Storage(tmp_path), "checkpoints", make_writer=WriterProcess)
    before = _child_pids()
    with store.begin_attempt() as attempt:
        for step in (1, 2):
            weights = {"weights": {"x": torch.full((100,), float(step))}}
            attempt.save(step, tensors=weights, state={}, metrics={}, config={}, dataset_id="d")
        attempt.wait()
        assert _child_pids() - before
    loaded = store.load_latest()
    assert loaded is not None
    assert torch.equal(loaded.read("weights")["x"], torch.full((100,), 2.0))
    assert _child_pids() == before


def test_errors_come_as_they_are(tmp_path: Path, writer: WriterProcess) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        writer.write(Storage(tmp_path / "file"), "folder", _images(1))
    with pytest.raises(RuntimeError, match="StrangeError: what is strange"):
        writer.write(StrangeStorage(tmp_path), "folder", _images(1))
    writer.write(Storage(tmp_path), "folder", _images(1))
    assert _read(tmp_path / "folder")


class Writing:
    """A write that is under way in a thread, and waits."""

    def __init__(self, root: Path, writer: WriterProcess) -> None:
        self.root = root
        self.images = _images(1)
        self.is_done = False
        self._writer = writer
        self._before = _child_pids()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()
        _wait_for(lambda: "a test" in WAITS.known())

    @property
    def pid(self) -> int:
        _wait_for(lambda: _child_pids() - self._before)
        return (_child_pids() - self._before).pop()

    def end(self) -> None:
        (self.root / GO).touch()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _write(self) -> None:
        self._writer.write(WaitingStorage(self.root), "folder", self.images)
        self.is_done = True


def test_what_it_waits_for_is_a_wait_of_the_rank(tmp_path: Path, writer: WriterProcess) -> None:
    writing = Writing(tmp_path, writer)
    (process,) = ACTIVITY.helper_processes()
    assert process.pid == writing.pid
    writing.end()
    assert not WAITS.known()
    assert not ACTIVITY.helper_processes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_lost_or_stopped_is_followed_by_another(
    tmp_path: Path,
    writer: WriterProcess,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(writer_process, "_SILENT_S", 3.0)
    caplog.set_level(logging.WARNING)
    writing = Writing(tmp_path, writer)
    first = writing.pid
    os.kill(first, number)
    _wait_for(lambda: "another one writes the files again" in caplog.text)
    writing.end()
    assert writing.is_done
    assert first not in _child_pids()
    WriterHere().write(Storage(tmp_path), "here", writing.images)
    assert _read(tmp_path / "folder") == _read(tmp_path / "here")


def test_losses_one_after_another_are_an_error(
    tmp_path: Path, writer: WriterProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_process, "__name__", "fqgan_dist.no_such_module")
    with pytest.raises(LossError, match="ended with code 1, 4 times"):
        writer.write(Storage(tmp_path), "folder", _images(1))


def test_what_it_logs_is_logged_by_the_rank(
    tmp_path: Path, writer: WriterProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError):
        writer.write(StrangeStorage(tmp_path), "folder", _images(1))
    assert "Traceback" in caplog.text
    assert "what is strange" in caplog.text


def _find_writer(rank: int) -> int | None:
    """Find the process among all that the rank starts; others come and go."""
    for text in Path(f"/proc/{rank}/task/{rank}/children").read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"writer_process" in Path(f"/proc/{text}/cmdline").read_bytes():
                return int(text)
    return None


_RANK = """
import sys, torch
from fqgan_dist.training.checkpoint_files import HostStaging
from fqgan_dist.training.writer_process import WriterProcess
from support.slow_storage import WaitingStorage
images = HostStaging(0).copy({"part": {"x": torch.ones(10)}})
WriterProcess().write(WaitingStorage(sys.argv[1]), "folder", images)
"""


def test_it_ends_with_its_rank_and_ignores_signals_for_all(tmp_path: Path) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", _RANK, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    child = _wait_for(lambda: _find_writer(rank.pid))
    command = Path(f"/proc/{child}/cmdline")
    status = Path(f"/proc/{child}/status")
    ignored = (1 << signal.SIGTERM - 1) | (1 << signal.SIGINT - 1)
    _wait_for(
        lambda: int(status.read_text().split("SigIgn:")[1].split()[0], 16) & ignored == ignored
    )
    rank.kill()
    rank.wait()
    _wait_for(lambda: not command.exists())
    (tmp_path / GO).touch()
    time.sleep(0.1)
    assert not (tmp_path / "folder").exists()
