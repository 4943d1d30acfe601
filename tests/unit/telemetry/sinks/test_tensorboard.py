from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from support.sessions import resumed_at

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metric_sink import TrackedRun
from fqgan_dist.telemetry.sinks import tensorboard
from fqgan_dist.telemetry.sinks.tensorboard import build_sink

LOSS = "tokenizer/loss/commitment"


class FullDisk:
    """A disk on which files that are opened for appending have room for so many bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        open_path = Path.open

        def open_with_room(path: Path, mode: str = "r") -> Any:
            file = open_path(path, mode, buffering=0)
            write = file.write
            if mode == "ab":
                return _FileWithRoom(file, write, self)
            return file

        monkeypatch.setattr(Path, "open", open_with_room)


class _FileWithRoom:
    def __init__(self, file: Any, write: Callable[[bytes], int], disk: FullDisk) -> None:
        self._file, self._write, self._disk = file, write, disk

    def write(self, data: bytes) -> None:
        """Write what there is room for, as a disk does."""
        written = self._write(data[: self._disk.room])
        self._disk.room -= written
        if written < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars(LOSS)]


def write_steps(run: TrackedRun, steps: range) -> None:
    sink = build_sink(run)
    sink.open(resumed_at(steps.start - 1))
    for step in steps:
        sink.write(step, {LOSS: 1.0 / step}, images_seen=8 * step)
    sink.flush()
    sink.close()


def test_it_has_the_values_and_forgets_what_a_killed_session_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrackedRun(storage=Storage(tmp_path), stage="tokenizer", name="trial")
    write_steps(run, range(1, 6))
    write_steps(run, range(4, 7))
    events = EventAccumulator(str(tmp_path / "tokenizer" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars(LOSS)] == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]


def test_a_full_disk_stops_nothing_and_loses_nothing_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(monkeypatch, room=170)
    sink = build_sink(TrackedRun(storage=Storage(tmp_path), stage="tokenizer", name="trial"))
    sink.open(resumed_at(0))
    for step in range(1, 6):
        sink.write(step, {LOSS: 1.0}, images_seen=step)
    sink.flush()
    assert caplog.text.count("training goes on") == 1
    assert "No space left on device" in caplog.text
    folder = tmp_path / "tokenizer" / "tensorboard"
    assert read_steps(folder) == [1]
    disk.room = 10**6
    sink.write(6, {LOSS: 1.0}, images_seen=6)
    sink.close()
    assert read_steps(folder) == [1, 2, 3, 4, 5, 6]
    assert "nothing was lost" in caplog.text


def test_what_waits_for_room_is_bounded_and_what_is_lost_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorboard, "_MAX_WAITING", 4)
    disk = FullDisk(monkeypatch, room=0)
    sink = build_sink(TrackedRun(storage=Storage(tmp_path), stage="tokenizer", name="trial"))
    sink.open(resumed_at(0))
    for step in range(1, 6):
        sink.write(step, {LOSS: 1.0}, images_seen=step)
    disk.room = 10**6
    sink.flush()
    assert read_steps(tmp_path / "tokenizer" / "tensorboard") == [4, 5]
    assert "3 records are lost; metrics.jsonl has all" in caplog.text
    disk.room = 0
    sink.write(6, {LOSS: 1.0}, images_seen=6)
    sink.close()
    assert "1 records are lost" in caplog.text
