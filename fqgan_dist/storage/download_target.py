"""The local file that an object is downloaded into, by several writers at once."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HASHED_BYTES = 2**20


class TargetFileError(OSError):
    """The file of this machine cannot be written; `errno` tells why (ENOSPC: the disk is full).

    The store is not at fault, so callers can tell it from a DataError and do without the file.
    """


class TargetFile:
    """A new file of known size. Safe to use from several threads."""

    def __init__(self, path: Path, size: int) -> None:
        """Create the file if its disk has room for it.

        Raises:
            TargetFileError: it exists, the disk is too full, or the folder cannot be written.
        """
        self._path = path
        self._lock = threading.Lock()
        self._is_open = True
        self._hash = hashlib.sha256()
        with self._own_errors():
            disk = os.statvfs(path.parent)
            # Not by reserving the space: where it does not suffice, ext4 first takes all there is.
            if size > disk.f_bavail * disk.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Write bytes at their place. After `close` it does nothing: the download was given up."""
        view = memoryview(data)
        # One writer at a time: `close` must not pull the descriptor from under another thread.
        with self._lock, self._own_errors():
            while view and self._is_open:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written

    def hash(self, offset: int, size: int) -> None:
        """Add a part that is written to the hash; the parts come in the order of their offsets."""
        end = offset + size
        while offset < end:
            with self._lock, self._own_errors():
                if not self._is_open:
                    return
                data = os.pread(self._descriptor, min(_HASHED_BYTES, end - offset), offset)
            if not data:
                raise TargetFileError(errno.EIO, "the file was cut while written", str(self._path))
            self._hash.update(data)
            offset += len(data)

    @property
    def sha256(self) -> str:
        """Hash of the parts so far, in hex."""
        return self._hash.hexdigest()

    def close(self) -> None:
        with self._lock:
            if self._is_open:
                self._is_open = False
                os.close(self._descriptor)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TargetFileError(error.errno, error.strerror, str(self._path)) from error


@contextmanager
def create_target(path: Path, size: int) -> Iterator[TargetFile]:
    """Create a target that is closed at the end, and removed if an error ends the block."""
    target = TargetFile(path, size)
    try:
        yield target
    except BaseException:
        target.close()
        target.remove()
        raise
    target.close()
