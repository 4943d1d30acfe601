"""A process that writes the files of a rank's checkpoints, which takes training's interpreter none.

It maps the memory that the rank's state was copied to, hashes it and writes it. It commits nothing:
that is the attempt's. What it waits for, and logs, is the rank's: both go to the rank as messages.
It ends when the other end of its socket is closed, however the rank ends.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Protocol

from fqgan_dist.activity import ACTIVITY, Helper
from fqgan_dist.errors import FqganError, LossError
from fqgan_dist.stopped_processes import ProcessId, end_process, endable_process
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_format import BlockHashes
from fqgan_dist.training.checkpoint_transfer import write_files
from fqgan_dist.waiting import WAITS, Wait

logger = logging.getLogger(__name__)

_NOTE_EVERY_S = 1.0
# Not even a busy machine keeps a process from saying a word for so long.
_SILENT_S = 120.0
_MAX_LOSSES = 3
_END_S = 10.0
# Far below training and its loaders: where there are too few cores for all, a step must not wait
# for a save. It keeps a thirtieth of a core that training wants, too.
_NICE = 15


class Memory(Protocol):
    """Memory that another process can map."""

    @property
    def descriptor(self) -> int: ...

    @property
    def view(self) -> memoryview: ...


class HeldFile(Protocol):
    """A file as it lies in memory."""

    @property
    def name(self) -> str: ...

    @property
    def memory(self) -> Memory: ...


class FileWriter(Protocol):
    """Writes the files of one checkpoint after another."""

    def write(
        self, storage: Storage, folder: str, files: Sequence[HeldFile]
    ) -> dict[str, BlockHashes]:
        """Write files below their names; give what each hashes to. Raises as `Storage` does."""
        ...

    def close(self) -> None: ...


class WriterHere:
    """Writes from the calling thread and its helpers."""

    def write(
        self, storage: Storage, folder: str, files: Sequence[HeldFile]
    ) -> dict[str, BlockHashes]:
        return write_files(storage, folder, {file.name: file.memory.view for file in files})

    def close(self) -> None:
        pass


class WriterProcess:
    """Writes from a process of its own, which is started with the first file.

    One that is lost or stands still is ended, and another one writes the same again: files that
    nobody has committed may be written any number of times.
    """

    def __init__(self) -> None:
        self._child: _Child | None = None

    def write(
        self, storage: Storage, folder: str, files: Sequence[HeldFile]
    ) -> dict[str, BlockHashes]:
        """Write files, see `FileWriter`.

        Raises:
            LossError: process after process was lost.
        """
        losses = 0
        while True:
            self._child = self._child or _Child()
            try:
                return self._child.write(storage, folder, files)
            except _LostError as error:
                losses += 1
                self.close()
                if losses > _MAX_LOSSES:
                    raise LossError(
                        f"the process that writes checkpoints: {error}, {losses} times; look for "
                        "what ends it (the kernel's log names processes that took too much memory)"
                    ) from error
                logger.warning(
                    "the process that writes checkpoints: %s; another one writes the files again",
                    error,
                )

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()


class _LostError(Exception):
    pass


class _Child:
    """The process, as its rank sees it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            start = f"from {__name__} import main; main()"
            command = [sys.executable, "-P", "-c", start, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                # Ray extends sys.path in its workers, but not the environment.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self._id: ProcessId | None = None
        self._sent: list[Memory] = []

    def write(
        self, storage: Storage, folder: str, files: Sequence[HeldFile]
    ) -> dict[str, BlockHashes]:
        with ACTIVITY.helped_by(self._describe), _MirroredWait() as wait:
            try:
                self._send(storage, folder, files)
                while True:
                    match self._receive():
                        case "note", (cause, has_moved):
                            wait.show(cause)
                            if has_moved:
                                ACTIVITY.note_storage()
                        case "log", (name, level, text):
                            logging.getLogger(name).log(level, "%s", text)
                        case "here", process:
                            self._id = process
                        case "failed", error:
                            raise error
                        case "done", hashes:
                            return hashes
                        case other:
                            raise AssertionError(f"no message of a writer: {other}")
            except (EOFError, ConnectionError) as error:
                raise _LostError(f"ended with {self._end()}") from error

    def close(self) -> None:
        self._connection.close()
        self._end()

    def _send(self, storage: Storage, folder: str, files: Sequence[HeldFile]) -> None:
        # A number per memory, in the order in which they were first sent; memory that is not
        # named any more is given up on both sides.
        memories = [file.memory for file in files]
        new = [memory for memory in memories if memory not in self._sent]
        kept = [self._sent.index(memory) for memory in memories if memory in self._sent]
        order = [*(self._sent[index] for index in kept), *new]
        places = [order.index(memory) for memory in memories]
        named = [(file.name, place) for file, place in zip(files, places, strict=True)]
        sizes = [len(memory.view) for memory in new]
        self._connection.send((storage, folder, named, kept, sizes))
        for memory in new:
            send_handle(self._connection, memory.descriptor, self._process.pid)
        self._sent = order

    def _receive(self) -> tuple[str, Any]:
        if not self._connection.poll(_SILENT_S):
            raise _LostError(f"was silent for {_SILENT_S:.0f} s, {self._end(is_silent=True)}")
        return self._connection.recv()

    def _describe(self) -> Helper:
        return Helper(processes=() if self._id is None else (self._id,))

    def _end(self, *, is_silent: bool = False) -> str:
        """Wait until it has ended, or end it; say how."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if is_silent else _END_S)
        if self._process.returncode is None:
            stacks = end_process(self._id) if self._id is not None else None
            self._process.kill()
            self._process.wait()
            return f"was ended; its stacks:\n{stacks}"
        return f"code {self._process.returncode}"


class _MirroredWait(ExitStack):
    """Shows what a process waits for as a wait of this one."""

    def __init__(self) -> None:
        super().__init__()
        self._number: int | None = None

    def show(self, cause: Wait | None) -> None:
        if cause is None:
            self.close()
            self._number = None
        elif self._number is None:
            self._number = WAITS.begin(cause.what, since=cause.since)
            self.callback(WAITS.end, self._number)
        else:
            WAITS.change(self._number, cause.what)


@dataclass
class _Sender:
    """Sends messages to the rank, from any thread."""

    connection: Connection
    lock: threading.Lock

    def send(self, kind: str, content: Any) -> None:
        try:
            with self.lock:
                self.connection.send((kind, content))
        except ConnectionError:
            os._exit(1)  # nobody is left to write for


class _SendingHandler(logging.Handler):
    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send("log", (record.name, record.levelno, self.format(record)))


def main() -> None:
    """Write what comes over the socket whose number is the first argument, until it is closed."""
    # What ends the rank ends this process; a signal for all of them must not come before it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    connection = Connection(int(sys.argv[1]))
    sender = _Sender(connection, threading.Lock())
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[_SendingHandler(sender)]
    )
    with endable_process() as process:
        sender.send("here", process)
        _serve(connection, sender)


def _serve(connection: Connection, sender: _Sender) -> None:
    storages: dict[tuple[type, str], Storage] = {}
    maps: list[mmap.mmap] = []
    while True:
        try:
            storage, folder, named, kept, sizes = connection.recv()
            new = [_map(connection, size) for size in sizes]
        except (EOFError, ConnectionError):
            return
        maps = [*(maps[index] for index in kept), *new]
        # The first of a root keeps its connections.
        storage = storages.setdefault((type(storage), storage.root), storage)
        files = {name: memoryview(maps[place]) for name, place in named}
        try:
            with _sending_notes(sender):
                hashes = write_files(storage, folder, files)
        except Exception as error:
            if not isinstance(error, FqganError | OSError):
                logger.exception("writing %s to %s", ", ".join(files), storage.uri(folder))
            sender.send("failed", _picklable(error))
        else:
            sender.send("done", hashes)


def _map(connection: Connection, size: int) -> mmap.mmap:
    descriptor = recv_handle(connection)
    try:
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever a class's own code raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _sending_notes(sender: _Sender) -> Iterator[None]:
    """Tell what this process waits for, and that it is there, during a block."""
    is_over = threading.Event()

    def send() -> None:
        while not is_over.wait(_NOTE_EVERY_S):
            has_moved = ACTIVITY.storage_still_s < 2 * _NOTE_EVERY_S
            sender.send("note", (WAITS.cause(), has_moved))

    notes = threading.Thread(target=send, name="notes", daemon=True)
    notes.start()
    try:
        yield
    finally:
        is_over.set()
        notes.join()
