"""TensorBoard's event files, in `tensorboard/` beside `metrics.jsonl`.

Not by its own writer: that one's thread dies of a full disk, with a traceback, and leaves a torn
record, at which readers stop. Here a record is in the file whole or waits for room.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fqgan_dist.errors import StorageOutageError
from fqgan_dist.storage.disk_errors import is_passing_disk_error
from fqgan_dist.telemetry.metric_sink import MetricSink, TrackedRun
from fqgan_dist.telemetry.published import PublishedFolder
from fqgan_dist.telemetry.sessions import Session

_MAX_WAITING = 100_000
"""Records that are kept while there is no room for them: 10 MB."""

_logger = logging.getLogger(__name__)
_numbers = itertools.count()


def build_sink(run: TrackedRun) -> MetricSink:
    return _TensorBoard(run)


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder: PublishedFolder | None = None
        self._file: _EventFile | None = None
        self._waiting: deque[bytes] = deque()
        self._num_lost = 0
        self._is_full = False

    def open(self, session: Session) -> None:
        # A training that went back to a checkpoint opens it again.
        self._folder, self._file = None, None
        self._waiting.clear()
        self._add(file_version="brain.Event:2")
        # TensorBoard hides what a killed session logged from this step on; 1: it begins there.
        self._add(step=session.resumed_step + 1, session_log={"status": 1})
        self._write_out()

    def write(self, step: int, numbers: Mapping[str, float], *, images_seen: int) -> None:  # noqa: ARG002  part of MetricSink
        for name, value in numbers.items():
            self._add(step=step, summary={"value": [{"tag": name, "simple_value": value}]})
        self._write_out()

    def flush(self) -> None:
        self._write_out()
        self._publish()

    def close(self) -> None:
        self._write_out()
        if self._waiting or self._num_lost:
            self._say_lost(self._num_lost + len(self._waiting))
        self._publish()
        if self._folder is not None:
            self._folder.close()

    def _publish(self) -> None:
        if self._folder is None:
            return
        try:
            self._folder.publish()
        except StorageOutageError as error:
            # The whole file is brought the next time.
            _logger.warning("tensorboard: not brought to the storage now: %s", error)
        except BaseException:
            self._folder.close()  # who fails is not called again
            raise

    def _add(self, **event: Any) -> None:
        self._waiting.append(_encode(event))
        if len(self._waiting) > _MAX_WAITING:
            # Not the first two: without them no reader takes the rest.
            del self._waiting[2]
            self._num_lost += 1

    def _write_out(self) -> None:
        """Append what waits; where the disk has no room it waits on, and that is said once."""
        try:
            if self._file is None:
                path = f"{self._run.stage}/tensorboard"
                self._folder = self._folder or PublishedFolder(self._run.storage, path)
                self._file = _EventFile(self._folder.local)
            self._file.append(b"".join(self._waiting))
        except (OSError, StorageOutageError) as error:
            if isinstance(error, OSError) and not is_passing_disk_error(error):
                raise
            if not self._is_full:
                self._is_full = True
                _logger.warning(
                    "tensorboard: cannot be written (%s); its records wait for room, the newest %d "
                    "of them; training goes on",
                    error,
                    _MAX_WAITING,
                )
            return
        self._waiting.clear()
        if self._is_full:
            self._is_full = False
            if self._num_lost:
                self._say_lost(self._num_lost)
                self._num_lost = 0
            else:
                _logger.warning("tensorboard: written again; nothing was lost")

    def _say_lost(self, number: int) -> None:
        _logger.warning("tensorboard: %d records are lost; metrics.jsonl has all", number)


class _EventFile:
    """A new event file, named as readers look for them."""

    def __init__(self, folder: Path) -> None:
        # Readers take a folder's files in the order of their names.
        name = f"{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._path = folder / f"events.out.tfevents.{name}"
        self._size = 0

    def append(self, data: bytes) -> None:
        """Write bytes at the end, all or none.

        Raises:
            OSError: they are not there.
        """
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, self._size)
            raise
        self._size += len(data)


def _encode(event: Mapping[str, Any]) -> bytes:
    """Give a record of an event of now."""
    # Imported here: only a process that trains pays for it.
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    message: Any = event_pb2
    sink = io.BytesIO()
    RecordWriter(sink).write(message.Event(wall_time=time.time(), **event).SerializeToString())
    return sink.getvalue()
