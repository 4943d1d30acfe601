"""One log file for every process of a run, in the run's storage.

Below a local root a process writes its file in place. An object cannot be appended to: for a bucket
the file lies in a temporary folder and is published whole every 30 seconds and at the end, so a
process that is killed loses at most its last 30 seconds.
"""

from __future__ import annotations

import atexit
import functools
import logging
import secrets
import sys
import tempfile
import threading
import time
from pathlib import Path

from fqgan_dist.errors import FqganError
from fqgan_dist.storage.disk_errors import clear_disk_errors
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
    with clear_disk_errors(local):
        local.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(local)


def publish_log() -> None:
    """Bring the log of this process to the run's storage now; nothing to do below a local root."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PublishedLogFile):
            handler.publish()


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
    """A log file; one that cannot be written is said once, and fails nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        # logging's own would print a traceback for every line.
        error = sys.exc_info()[1]
        if not self._is_failing and sys.stderr is not None:
            self._is_failing = True
            text = f"WARNING {self.baseFilename}: lines of the log are lost ({error})"
            sys.stderr.write(f"{clean_text(text)}\n")


class PublishedLogFile(_LogFile):
    """A temporary log file that is published from time to time, and when it is closed."""

    def __init__(self, storage: Storage, path: str, interval_s: float) -> None:
        """Open the file and begin to publish it under a path of the storage."""
        with clear_disk_errors(tempfile.gettempdir()):
            self._folder = tempfile.TemporaryDirectory(prefix="fqgan-log-")
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
