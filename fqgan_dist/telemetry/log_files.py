"""One log file for every process of a run, in the run's storage.

Below a local root a process writes its file in place. An object cannot be appended to: for a bucket
the file lies in a temporary folder and is published whole every 30 seconds and at the end, so a
process that is killed loses at most its last 30 seconds.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.errors import FqganError
from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.disk_waits import wait_for_disk
from fqgan_dist.storage.scratch import ScratchFolder
from fqgan_dist.storage.storage import Storage
from fqgan_dist.terminal import clean_text

PUBLISH_INTERVAL_S = 30.0
LOG_FOLDER = "logs"

logger = logging.getLogger(__name__)


def name_log_file(process: str) -> str:
    """Name the log file of a process (`tokenizer-rank-00003`): unique, sorted by its start."""
    # Attempts at one rank may overlap, on nodes whose clocks differ: time alone is not unique.
    started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    return f"{process}-{started}-{secrets.token_hex(4)}.log"


def open_log_file(
    storage: Storage, process: str, *, interval_s: float = PUBLISH_INTERVAL_S
) -> logging.FileHandler:
    """Open the log file of this process under the root's `logs/`, for `configure_logging`.

    In a bucket it is published every `interval_s`.
    """
    path = f"{LOG_FOLDER}/{name_log_file(process)}"
    local = storage.local_path(path)
    if local is None:
        return PublishedLogFile(storage, path, interval_s)

    def open_here() -> _LogFile:
        local.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(local)

    # A run waits for room here, as its first lines say what it is.
    with clear_disk_errors(local):
        return wait_for_disk(str(local), open_here)


def publish_log() -> None:
    """Bring the log of this process to the run's storage now; nothing to do below a local root."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PublishedLogFile):
            handler.publish()


def write_to_log(text: str) -> None:
    """Write lines to the log file of this process only, such as stacks that no console shall show.

    Without a log file they go where log lines go.
    """
    record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, text, (), None)
    files = [each for each in logging.getLogger().handlers if isinstance(each, _LogFile)]
    for handler in files:
        handler.handle(record)
    if not files:
        logger.handle(record)


@functools.cache
def _publish_at_exit() -> None:
    # An ordinary atexit function is too late for clients of object stores: concurrent.futures
    # refuses work by then. Only this private hook of Python comes earlier; its functions are called
    # in reverse order. Where it is missing, the log's last seconds may be.
    import concurrent.futures.thread  # noqa: F401  registers its own end before ours

    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(publish_log)


class _LogFile(logging.FileHandler):
    """A log file; lines that cannot be written are lost, said once, and fail nothing.

    Each line is one write to the file, without a buffer: what a full disk refuses must not be in
    the way of what comes when there is room again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self._descriptor = self._open_file()
        self._num_lost = 0
        self._is_torn = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  arguments that do not fit a message are no end
            self.handleError(record)
            return
        try:
            if self._num_lost:
                self._write(f"{self._num_lost} lines of the log are lost here: {self._reason}")
                self._num_lost = 0
            self._write(line)
        except OSError as error:
            self._lose(error)

    def close(self) -> None:
        """Close the file; lines that come later open it again."""
        with self.lock or nullcontext():
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        super().close()

    def _write(self, line: str) -> None:
        if self._descriptor < 0:
            self._descriptor = self._open_file()
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        view = memoryview(b"\n" + data if self._is_torn else data)
        while view:
            written = os.write(self._descriptor, view)
            view, self._is_torn = view[written:], True
        self._is_torn = False

    def _open_file(self) -> int:
        return os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def _lose(self, error: OSError) -> None:
        self._num_lost += 1
        self._reason = str(error)
        if self._num_lost == 1 and sys.stderr is not None:
            text = (
                f"WARNING {self.baseFilename}: lines of the log are lost ({error}) until it can be "
                "written again; all else goes on"
            )
            sys.stderr.write(f"{clean_text(text)}\n")


class PublishedLogFile(_LogFile):
    """A temporary log file that is published from time to time, and when it is closed."""

    def __init__(self, storage: Storage, path: str, interval_s: float) -> None:
        """Open the file and begin to publish it under a path of the storage."""
        with clear_disk_errors(tempfile.gettempdir()):
            self._folder = wait_for_disk(tempfile.gettempdir(), lambda: ScratchFolder("log"))
            self._file = Path(self._folder.name) / "process.log"
            super().__init__(self._file)
        self._storage = storage
        self._path = path
        self._interval_s = interval_s
        self._published_bytes = 0
        self._is_unpublished = False
        self._publishing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish_regularly, name="logs", daemon=True)
        self._thread.start()
        _publish_at_exit()
        atexit.register(self._close_at_exit)

    def publish(self) -> None:
        """Write the file's content to the storage if it has grown.

        A storage that cannot be reached is warned of once: a log never fails the work it tells of.
        """
        with self._publishing:
            data = self._file.read_bytes()
            if len(data) == self._published_bytes:
                return
            try:
                with ACTIVITY.aside():  # a log grows in a standstill too
                    self._storage.write_bytes(self._path, data)
            # At the interpreter's end clients raise RuntimeError: their thread pools are gone.
            except (FqganError, OSError, RuntimeError) as error:
                self._warn_once(error)
                return
            self._published_bytes = len(data)
            self._is_unpublished = False

    def close(self) -> None:
        """Publish the rest and remove the temporary file; closing twice is harmless."""
        if not self._stop.is_set():
            atexit.unregister(self._close_at_exit)
            self._stop.set()
            self._thread.join()
            self.flush()
            self.publish()
            super().close()
            self._folder.cleanup()

    def _close_at_exit(self) -> None:
        # Before logging's own end, which closes under the handler's lock: a client that logs while
        # we publish would wait for that lock for ever.
        logging.getLogger().removeHandler(self)
        self.close()

    def _publish_regularly(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.publish()

    def _warn_once(self, error: Exception) -> None:
        if not self._is_unpublished:
            self._is_unpublished = True
            logger.warning(
                "%s cannot be published (%s: %s); it is tried again every %g s",
                self._path,
                type(error).__name__,
                error,
                self._interval_s,
            )
