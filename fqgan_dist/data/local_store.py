"""A local directory as an object store.

A write goes to a temporary file and is synced; then a rename (replace) or a hard link (create-only)
gives it its name, and the folder is synced: after a crash the object is whole or not there.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fqgan_dist.errors import DataError

_TEMPORARY_MARK = ".writing-"
_COPY_BYTES = 8 * 2**20


class LocalBackend:
    """Objects as files; names are absolute paths."""

    def size(self, uri: str) -> int:
        """Read a file's size; a folder is no object, as on S3."""
        if os.path.isdir(uri):
            raise FileNotFoundError(uri)
        return os.stat(uri).st_size

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        """Read a range, or to the end where `length` is None."""
        with self.open_read(uri) as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        """Read a range of each file."""
        return [
            self.read(uri, start, size) for uri, (start, size) in zip(uris, ranges, strict=True)
        ]

    def open_read(self, uri: str) -> BinaryIO:
        """Open a file; a folder is no object."""
        if os.path.isdir(uri):
            raise FileNotFoundError(uri)
        return open(uri, "rb")

    def write(self, uri: str, data: bytes) -> None:
        """Replace a file."""
        self._replace(uri, [data])

    def write_file(self, uri: str, source: Path) -> None:
        """Replace a file by a copy of another one."""
        with source.open("rb") as file:
            self._replace(uri, iter(lambda: file.read(_COPY_BYTES), b""))

    def create(self, uri: str, data: bytes) -> None:
        """Make a new file; FileExistsError where the name is taken."""
        with _temporary_file(uri, [data]) as temporary:
            # Unlike a rename, a link fails where the name is taken, on NFS too.
            os.link(temporary, uri)
        _sync_directory(os.path.dirname(uri))

    def names(self, uri: str) -> list[str]:
        """List a folder without the temporary files of writers."""
        return [name for name in os.listdir(uri) if _TEMPORARY_MARK not in name]

    def delete(self, uri: str) -> None:
        """Remove a file if it is there."""
        try:
            os.unlink(uri)
        except (FileNotFoundError, NotADirectoryError):
            return
        _sync_directory(os.path.dirname(uri))

    def _replace(self, uri: str, chunks: Iterable[bytes]) -> None:
        with _temporary_file(uri, chunks) as temporary:
            os.replace(temporary, uri)
        _sync_directory(os.path.dirname(uri))


@contextmanager
def _temporary_file(uri: str, chunks: Iterable[bytes]) -> Iterator[str]:
    """Write data durably beside its final name; whatever is left of it is removed at the end."""
    folder, name = os.path.split(uri)
    _make_directory(folder)
    temporary = os.path.join(folder, f".{name[:100]}{_TEMPORARY_MARK}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def _make_directory(folder: str) -> None:
    """Create a folder so that it survives a power loss: its parent is synced too."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_directory(parent)
    try:
        os.mkdir(folder)
    except FileExistsError as error:
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: a file is where a folder should be; remove it") from error
        return  # another process was first
    _sync_directory(parent)


def _sync_directory(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
