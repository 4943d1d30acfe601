"""A local directory as an object store.

A write goes to a temporary file and is synced; then a rename (replace) or a hard link (create-only)
gives it its name, and the folder is synced: after a crash the object is whole or not there.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fqgan_dist.errors import DataError
from fqgan_dist.storage.download_target import create_target

_TEMPORARY_MARK = ".writing-"
_COPY_BYTES = 8 * 2**20


class LocalBackend:
    """Objects as files; names are absolute paths."""

    num_retries = 0
    """Nothing is repeated on a disk."""

    def size(self, uri: str) -> int:
        entry = os.stat(uri)
        if stat.S_ISDIR(entry.st_mode):
            raise _no_object(uri)
        return entry.st_size

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        with self.open_read(uri) as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        return [
            self.read(uri, start, size) for uri, (start, size) in zip(uris, ranges, strict=True)
        ]

    def open_read(self, uri: str) -> BinaryIO:
        if os.path.isdir(uri):
            raise _no_object(uri)
        return open(uri, "rb")

    def download(
        self, uri: str, target: Path, progress: Callable[[int], None] | None
    ) -> tuple[str, int]:
        size = self.size(uri)
        with self.open_read(uri) as source, create_target(target, size) as file:
            for offset in range(0, size, _COPY_BYTES):
                data = source.read(min(_COPY_BYTES, size - offset))
                file.write(offset, data)
                file.hash(offset, len(data))
                if progress is not None:
                    progress(len(data))
            return file.sha256, size

    def write(self, uri: str, data: bytes | memoryview) -> None:
        self._replace(uri, [data])

    def write_file(self, uri: str, source: Path) -> None:
        with source.open("rb") as file:
            self._replace(uri, iter(lambda: file.read(_COPY_BYTES), b""))

    def create(self, uri: str, data: bytes) -> None:
        with _temporary_file(uri, [data]) as temporary:
            # Unlike a rename, a link fails where the name is taken, on NFS too.
            os.link(temporary, uri)
        _sync_directory(os.path.dirname(uri))

    def names(self, uri: str) -> list[str]:
        return [name for name in os.listdir(uri) if _TEMPORARY_MARK not in name]

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        try:
            # Not `isdir`: it takes a folder that may not be entered for one that is not there.
            is_folder = stat.S_ISDIR(os.stat(uri).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return
        if is_folder:
            yield from _walk(uri, "", ())

    def delete(self, uri: str) -> None:
        try:
            os.unlink(uri)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return  # a folder is no object
        _sync_directory(os.path.dirname(uri))

    def _replace(self, uri: str, chunks: Iterable[bytes | memoryview]) -> None:
        with _temporary_file(uri, chunks) as temporary:
            os.replace(temporary, uri)
        _sync_directory(os.path.dirname(uri))


def _walk(
    folder: str, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, int]]:
    """List a folder's files, then those of its folders, in the order of whole names."""
    entry = os.stat(folder)
    identity = (entry.st_dev, entry.st_ino)
    if identity in above:
        raise DataError(f"{folder}: a link to a folder that it lies in; remove the link")
    found: list[tuple[bytes, str, os.stat_result]] = []
    with os.scandir(folder) as entries:
        for each in entries:
            with suppress(FileNotFoundError):  # a broken link, or just removed
                info = each.stat()
                # "a-b" comes before "a/x", as in a bucket, so folders sort with their slash.
                end = "/" if stat.S_ISDIR(info.st_mode) else ""
                found.append((os.fsencode(each.name + end), each.name, info))
    for _, name, info in sorted(found):
        if stat.S_ISDIR(info.st_mode):
            yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", (*above, identity))
        elif stat.S_ISREG(info.st_mode) and _TEMPORARY_MARK not in name:
            yield prefix + name, info.st_size


def _no_object(uri: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "a folder, not an object", uri)


@contextmanager
def _temporary_file(uri: str, chunks: Iterable[bytes | memoryview]) -> Iterator[str]:
    """Write data durably beside its final name; whatever is left of it is removed at the end."""
    folder, name = os.path.split(uri)
    _make_directory(folder)
    # In the same folder: neither a rename nor a link crosses file systems. A name has 255 bytes at
    # most: 42 of ours, and 50 characters of four.
    temporary = os.path.join(folder, f".{name[:50]}{_TEMPORARY_MARK}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            # Else the new name may survive a power cut, and the bytes not.
            os.fsync(file.fileno())
        yield temporary
    finally:
        if os.path.lexists(temporary):  # a rename took it away, a link did not
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
    # A folder's name is an entry of its parent, and is lost with it.
    _sync_directory(parent)


def _sync_directory(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
