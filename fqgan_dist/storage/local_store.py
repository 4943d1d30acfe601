"""A local directory as an object store.

A write goes to a temporary file and is synced; then a rename (replace) or a hard link (create-only)
gives it its name, and the folder is synced: after a crash the object is whole or not there. What a
killed writer leaves of its temporary file is removed by `sweep`, see `owners`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fqgan_dist.errors import DataError
from fqgan_dist.storage.disk_waits import wait_for_disk
from fqgan_dist.storage.download_target import create_target
from fqgan_dist.storage.leftovers import Swept, is_abandoned
from fqgan_dist.storage.links import RefusedObjectError, check_link
from fqgan_dist.storage.owners import FOREIGN_S, OWNER_PATTERN, name_owner

_TEMPORARY_MARK = ".writing-"
# Before this version names did not say whose they are: 32 digits.
_TEMPORARY = re.compile(
    rf"\..*{re.escape(_TEMPORARY_MARK)}(?:({OWNER_PATTERN})-[0-9a-f]{{8}}|[0-9a-f]{{32}})",
    re.DOTALL,
)
_COPY_BYTES = 8 * 2**20


class LocalBackend:
    """Objects as files; names are absolute paths. What is read is said in `links`."""

    num_retries = 0
    """Nothing is counted on a disk."""
    waited_s = 0.0

    def __init__(self, root: str, named_file: str | None = None) -> None:
        """Keep the links of a root.

        Args:
            root: the folder that the user named; links below it lead to what is below it.
            named_file: a file that the user named, which may be a link to anywhere.
        """
        self._root = root
        self._named_file = named_file
        # Looked at once per process: an epoch reads millions of files of few folders.
        self._folders_within: set[str] = set()

    def size(self, uri: str) -> int:
        self._check(uri)
        try:
            entry = os.stat(uri)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RefusedObjectError(f"{uri}: a circle of links; remove them") from error
            raise
        if stat.S_ISDIR(entry.st_mode):
            raise _no_object(uri)
        if not stat.S_ISREG(entry.st_mode):
            raise RefusedObjectError(
                f"{uri}: a device, pipe or socket; expected a regular file: remove it"
            )
        return entry.st_size

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        return wait_for_disk(uri, lambda: self._read(uri, offset, length))

    def _read(self, uri: str, offset: int, length: int | None) -> bytes:
        size = self.size(uri)
        with open(uri, "rb", buffering=0) as file:
            return _read_part(file.fileno(), size, offset, length)

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        numbers_of: dict[str, list[int]] = {}
        for number, uri in enumerate(uris):
            numbers_of.setdefault(uri, []).append(number)
        parts = [b""] * len(uris)

        def read(uri: str, numbers: list[int]) -> None:
            size = self.size(uri)
            with open(uri, "rb", buffering=0) as file:
                for number in numbers:
                    parts[number] = _read_part(file.fileno(), size, *ranges[number])

        for uri, numbers in numbers_of.items():
            wait_for_disk(uri, partial(read, uri, numbers))
        return parts

    def open_read(self, uri: str) -> BinaryIO:
        self.size(uri)  # before it is opened: that would wait for the writer of a pipe
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
        wait_for_disk(uri, lambda: self._replace(uri, [data]))

    def write_file(self, uri: str, source: Path) -> None:
        def write() -> None:
            with source.open("rb") as file:
                self._replace(uri, iter(lambda: file.read(_COPY_BYTES), b""))

        wait_for_disk(uri, write)

    def create(self, uri: str, data: bytes) -> None:
        wait_for_disk(uri, lambda: self._create(uri, data))

    def _create(self, uri: str, data: bytes) -> None:
        self._check_folder(os.path.dirname(uri))
        with _temporary_file(uri, [data]) as temporary:
            # Unlike a rename, a link fails where the name is taken, on NFS too.
            os.link(temporary, uri)
        _sync_directory(os.path.dirname(uri))

    def replace(self, uri: str, former: bytes, data: bytes) -> None:
        self.size(uri)  # what is wrong with the name is said of the name
        with _locked_folder(os.path.dirname(uri)):
            if self.read(uri, 0, None) != former:
                raise FileExistsError(uri)
            self._replace(uri, [data])

    def names(self, uri: str) -> list[str]:
        self._check_folder(uri)
        return [name for name in os.listdir(uri) if _TEMPORARY_MARK not in name]

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        try:
            # Not `isdir`: it takes a folder that may not be entered for one that is not there.
            is_folder = stat.S_ISDIR(os.stat(uri).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return
        if is_folder:
            self._check_folder(uri)
            yield from self._walk(uri, "", ())

    def delete(self, uri: str) -> None:
        self._check_folder(os.path.dirname(uri))
        try:
            os.unlink(uri)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return  # a folder is no object
        _sync_directory(os.path.dirname(uri))

    def sweep(self, uri: str, *, is_superseded: bool) -> Swept:
        try:
            is_folder = stat.S_ISDIR(os.lstat(uri).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return Swept()
        if not is_folder:
            return Swept()
        self._check_folder(uri)
        return _sweep(uri, is_superseded)

    def _replace(self, uri: str, chunks: Iterable[bytes | memoryview]) -> None:
        self._check_folder(os.path.dirname(uri))
        with _temporary_file(uri, chunks) as temporary:
            os.replace(temporary, uri)
        _sync_directory(os.path.dirname(uri))

    def _walk(
        self, folder: str, prefix: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[str, int]]:
        """List a folder's files, then those of its folders, in the order of whole names."""
        entry = os.stat(folder)
        identity = (entry.st_dev, entry.st_ino)
        if identity in above:
            raise DataError(f"{folder}: a link to a folder that it lies in; remove the link")
        found: list[tuple[bytes, str, os.stat_result]] = []
        with os.scandir(folder) as entries:
            for each in entries:
                try:
                    info = each.stat()
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):
                        continue  # a broken link, or just removed
                    raise
                if each.is_symlink():
                    check_link(each.path, self._root)
                # "a-b" comes before "a/x", as in a bucket, so folders sort with their slash.
                end = "/" if stat.S_ISDIR(info.st_mode) else ""
                found.append((os.fsencode(each.name + end), each.name, info))
        for _, name, info in sorted(found):
            if stat.S_ISDIR(info.st_mode):
                yield from self._walk(f"{folder}/{name}", f"{prefix}{name}/", (*above, identity))
            elif stat.S_ISREG(info.st_mode) and _TEMPORARY_MARK not in name:
                yield prefix + name, info.st_size

    def _check(self, uri: str) -> None:
        """Refuse a file that is, or lies behind, a link out of the root."""
        if uri == self._named_file:
            return
        self._check_folder(os.path.dirname(uri))
        if os.path.islink(uri):
            check_link(uri, self._root)

    def _check_folder(self, folder: str) -> None:
        if folder not in self._folders_within:
            check_link(folder, self._root)
            self._folders_within.add(folder)


def _read_part(descriptor: int, size: int, offset: int, length: int | None) -> bytes:
    """Read a part of a file of a size, as far as it goes."""
    # Memory for as many bytes as are there: offset and length may be numbers of a hostile table.
    end = size if length is None else min(size, offset + length)
    parts: list[bytes] = []
    while offset < end:
        data = os.pread(descriptor, end - offset, offset)  # 2 GiB at most
        if not data:
            break
        parts.append(data)
        offset += len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def _locked_folder(folder: str) -> Iterator[None]:
    """Hold a folder's lock, which others of this function wait for; not on all network disks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS wants a file that is open for writing
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _no_object(uri: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "a folder, not an object", uri)


@contextmanager
def _temporary_file(uri: str, chunks: Iterable[bytes | memoryview]) -> Iterator[str]:
    """Write data durably beside its final name; whatever is left of it is removed at the end."""
    folder, name = os.path.split(uri)
    make_directory(folder)
    # In the same folder: neither a rename nor a link crosses file systems.
    temporary = os.path.join(folder, _name_temporary(name))
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


def _name_temporary(name: str) -> str:
    # A name has 255 bytes at most: 57 of ours, and 49 characters of four.
    return f".{name[:49]}{_TEMPORARY_MARK}{name_owner()}-{secrets.token_hex(4)}"


def _sweep(folder: str, is_superseded: bool) -> Swept:
    """Remove what dead writers left in a folder and those below it; links are not followed."""
    swept = Swept()
    folders: list[str] = []
    # What may not be looked at or removed stays, and what is beside it goes.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif match := _TEMPORARY.fullmatch(entry.name):
                with suppress(OSError):  # also: finished, or swept by another, meanwhile
                    info = entry.stat(follow_symlinks=False)
                    if is_superseded or is_abandoned(
                        match[1],
                        lambda since=info.st_mtime: _read_clock(folder) - since,
                        foreign_s=FOREIGN_S,
                    ):
                        os.unlink(entry.path)
                        swept += Swept(1, info.st_size)
    for each in folders:
        swept += _sweep(each, is_superseded)
    return swept


def _read_clock(folder: str) -> float:
    """Read the time as the file system has it: a network's disk stamps files by its server's."""
    path = os.path.join(folder, _name_temporary("clock"))
    try:
        with open(path, "xb") as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()  # no room, for example; a day is longer than clocks differ
    finally:
        with suppress(OSError):
            os.unlink(path)


def make_directory(folder: str, *, mode: int = 0o777) -> None:
    """Create a folder so that it survives a power loss: its parent is synced too.

    Args:
        folder: its path; those above it are made as the process's umask says.
        mode: permissions of the folder if it is made here, less those that the umask takes away.

    Raises:
        DataError: a file is where it should be.
    """
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    make_directory(parent)
    try:
        os.mkdir(folder, mode)
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
