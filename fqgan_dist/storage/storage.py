"""Storage roots, local directories and buckets, behind one small interface.

All that the system knows of a run lies under one root (design.md section 1). Whole objects are
written at once: a reader sees the former bytes or the new ones, never a part. `create_bytes` is the
one primitive that decides races; commits of checkpoints and datasets rest on it.

The endpoint of S3 comes from `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, credentials from the
places where AWS tools look (environment, shared files, instance role); a URI never carries them.
Requests that a server throttles, breaks off or does not answer are repeated, with growing waits,
for as long as the process has patience without progress (`waiting`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.storage.backend import Backend
from fqgan_dist.storage.disk_errors import explain_disk_error
from fqgan_dist.storage.download_target import TargetFileError
from fqgan_dist.storage.leftovers import Swept
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.local_store import LocalBackend, make_directory
from fqgan_dist.storage.names import (
    check_bucket_root,
    check_relative_path,
    find_scheme,
    is_remote,
    split_bucket,
)
from fqgan_dist.storage.s3_store import S3Backend
from fqgan_dist.storage.uri import read_location

# The stores that there are beside local disks, by the schemes of `names.STORES`.
BACKENDS: dict[str, type[Backend]] = {"s3": S3Backend}
_PRIVATE_MODE = 0o750


class Storage:
    """Objects below a root, named by relative POSIX paths such as `tokenizer/metrics.jsonl`.

    Every method raises:
        ValueError: the path is absolute, or has an empty, `.` or `..` part.
        FileNotFoundError: an object that is read is missing.
        DataError: access is refused.
        StorageOutageError: the store cannot be reached, or a disk has no room, for longer than the
            process has patience.
        RefusedObjectError: on a disk, a link leads out of the root, or it is no regular file; see
            `links`.

    Safe to use from several threads, and picklable (spawned loader workers connect for themselves).
    """

    def __init__(self, root: str | Path) -> None:
        """Name a root, a directory or `s3://bucket/prefix`, without touching it.

        A directory is created at the first write.

        Raises:
            ConfigError: an unknown scheme, a URI without a bucket, or one with credentials.
        """
        self.root = check_root(str(root))
        # What links are held to: the root that was named, by children too.
        self._named_root = self.root
        self._named_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory of this machine (or one mounted on it)."""
        return not is_remote(self.root)

    def child(self, path: str) -> Storage:
        """Give the storage whose root is a folder of this one; "" is the root itself."""
        if not path:
            return self
        child = Storage(self.uri(path))
        child._named_root = self._named_root
        child.__dict__["_backend"] = self._backend  # one set of connections for all folders
        return child

    def make_private(self) -> None:
        """Make the root, a folder that is not there yet, one that no other user enters (0750)."""
        if self.is_local:
            with _clear_errors(self.root):
                make_directory(self.root, mode=_PRIVATE_MODE)

    @property
    def num_retries(self) -> int:
        """Requests that this process repeated so far, for this root, its parent and children."""
        return self._backend.num_retries

    @property
    def waited_s(self) -> float:
        """Seconds in which requests waited to be repeated, as `num_retries`."""
        return self._backend.waited_s

    def uri(self, path: str) -> str:
        """Give the full name of an object, for messages and records."""
        return f"{self.root}/{check_relative_path(path)}"

    def local_path(self, path: str) -> Path | None:
        """Give the file of an object, or None where the root is a bucket."""
        return Path(self.uri(path)) if self.is_local else None

    def exists(self, path: str) -> bool:
        """Tell whether an object is there, also one that its readers will refuse."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        except RefusedObjectError:
            return True
        return True

    def size(self, path: str) -> int:
        """Read an object's size in bytes."""
        uri = self.uri(path)
        with _clear_errors(uri):
            return self._backend.size(uri)

    def read_bytes(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read an object, or exactly `length` bytes of it from `offset`; large ones in parts.

        Raises:
            DataError: the object ends before `offset + length`.
        """
        _check_range(offset, length or 0)
        if length == 0:
            return b""
        uri = self.uri(path)
        with _clear_errors(uri):
            data = self._backend.read(uri, offset, length)
        if length is not None:
            _check_length(uri, data, offset, length)
        return data

    def read_limited(self, path: str, max_bytes: int) -> bytes:
        """Read a whole object that must not be longer than it may be.

        Raises:
            RefusedObjectError: it is; no more than that is read of it.
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            data = self._backend.read(uri, 0, max_bytes + 1)
        if len(data) > max_bytes:
            raise RefusedObjectError(
                f"{uri}: has more than {max_bytes} bytes, the most that it may have; it is damaged "
                "or not of this program"
            )
        return data

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read many parts (path, offset, length) at once, from a bucket concurrently.

        Raises:
            DataError: an object ends before the end of a part.
        """
        for _, offset, length in ranges:
            _check_range(offset, length)
        uri_of = {path: self.uri(path) for path in {path for path, _, _ in ranges}}
        uris = [uri_of[path] for path, _, _ in ranges]
        with _clear_errors(self.root):
            parts = self._backend.read_many(uris, [(start, size) for _, start, size in ranges])
        for uri, (_, offset, length), data in zip(uris, ranges, parts, strict=True):
            _check_length(uri, data, offset, length)
        return parts

    def open_read(self, path: str) -> BinaryIO:
        """Open an object as a seekable binary stream; the caller closes it.

        From a bucket it reads up to 32 MiB ahead while it is read in order.
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            return self._backend.open_read(uri)

    def download(
        self, path: str, target: Path, *, progress: Callable[[int], None] | None = None
    ) -> tuple[str, int]:
        """Copy a whole object to a new local file, from a bucket over up to 16 connections.

        The file is not synced to the disk, and removed if the download fails. Memory does not grow
        with the object. `progress` is told how many more bytes came, from another thread.

        Returns:
            sha256 of the object in hex, and its size.

        Raises:
            OSError: the target cannot be written; `errno` says why (ENOSPC for a full disk; a disk
                without room for it is refused before the first byte).
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            return self._backend.download(uri, target, progress)

    def write_bytes(self, path: str, data: bytes | memoryview) -> None:
        """Write a whole object, replacing a former one atomically and durably.

        A memoryview, of bytes, is not copied as a whole, and read until the call returns.
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            self._backend.write(uri, data)

    def write_file(self, path: str, source: Path) -> None:
        """Write a whole object as `write_bytes` does, from a local file of any size."""
        uri = self.uri(path)
        with _clear_errors(uri):
            self._backend.write_file(uri, source)

    def create_bytes(self, path: str, data: bytes) -> None:
        """Write a whole object only if there is none of that name; of several writers one wins.

        An object with the very same bytes counts as success.

        Raises:
            FileExistsError: an object with other bytes is there.
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            try:
                self._backend.create(uri, data)
            except FileExistsError:
                # A create whose answer was lost is tried again, and finds what it wrote.
                if self._backend.read(uri, 0, None) != data:
                    raise

    def replace_bytes(self, path: str, data: bytes, *, former: bytes) -> None:
        """Replace an object only if it has the bytes that the caller knows; of several one wins.

        In a bucket the store decides, by a conditional put. A disk has no such call: there writers
        of one machine wait for each other, those of others may not be seen in the last moment.
        An object with the very bytes that are written counts as success.

        Raises:
            FileExistsError: the object has other bytes.
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            try:
                self._backend.replace(uri, former, data)
            except FileExistsError:
                # One whose answer was lost is tried again, and finds what it wrote.
                if self._backend.read(uri, 0, None) != data:
                    raise

    def list(self, prefix: str = "") -> list[str]:
        """List the names of files and folders directly below a folder, sorted; [] if none."""
        uri = self.uri(prefix) if prefix else self.root
        with _clear_errors(uri):
            # In a bucket a folder that nobody wrote to is an empty one; disks follow.
            try:
                return sorted(self._backend.names(uri))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """List every object below a folder with its size in bytes; nothing if there is none.

        Names are relative to the folder, sorted by their bytes, and come page by page. They are
        what the store has, so hostile ones too: `uri` and all that reads refuse those. On a disk
        links within the root are followed; broken ones, devices, pipes and files still being
        written are left out.
        """
        uri = self.uri(prefix) if prefix else self.root
        with _clear_errors(uri):
            yield from self._backend.walk(uri)

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""
        uri = self.uri(path)
        with _clear_errors(uri):
            self._backend.delete(uri)

    def sweep(self, path: str = "", *, is_superseded: bool = False) -> Swept:
        """Remove what killed writers have left below a folder, of what no reader sees.

        On a disk these are temporary files of processes of this host that are gone, and those of
        other hosts that nobody has touched for a day; in a bucket uploads begun a day ago. With
        `is_superseded` all of them, of living writers too, whose writes fail then: of an attempt
        whose objects nobody will read.
        """
        uri = self.uri(path) if path else self.root
        with _clear_errors(uri):
            return self._backend.sweep(uri, is_superseded=is_superseded)

    @cached_property
    def _backend(self) -> Backend:
        scheme = find_scheme(self.root)
        if scheme is None:
            return LocalBackend(self._named_root, self._named_file)
        return BACKENDS[scheme]()

    # Connections, their locks and threads stay behind: another process makes its own.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_backend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"


def check_root(root: str) -> str:
    """Return a root in its one form: an absolute path, or `scheme://bucket/prefix`.

    Raises:
        ConfigError: an unknown scheme, a URI without a bucket, one with credentials, or a mistyped
            one.
    """
    scheme = find_scheme(root)
    if scheme is None:
        # Else a mistyped URI would be made as a folder.
        is_absolute = root.startswith("/") and not root.startswith("//")
        return os.path.abspath(root if is_absolute else read_location(root, what="storage root"))
    if scheme not in BACKENDS:
        expected = " or ".join(f"{known}://bucket/prefix" for known in BACKENDS)
        raise ConfigError(
            f"storage root {scheme}://...: unknown scheme; expected a path or {expected}"
        )
    return check_bucket_root(root)


def locate_file(uri: str) -> tuple[Storage, str]:
    """Give the storage of the folder of a file (a path or URI), and the file's name there.

    The user named the file: it alone may be a link to anywhere.

    Raises:
        ConfigError: it names no file, has an unknown scheme, or holds credentials.
    """
    # What else is wrong comes first: credentials must not be repeated.
    check_root(uri or ".")
    is_file = bool(split_bucket(uri)[1]) if is_remote(uri) else bool(uri)
    if not is_file or uri.endswith("/"):
        raise ConfigError(f"{uri!r}: names no file; expected a path or s3://bucket/path")
    folder, _, name = (uri if is_remote(uri) else os.path.abspath(uri)).rpartition("/")
    storage = Storage(folder or "/")
    storage._named_file = storage.uri(name) if storage.is_local else None
    return storage, name


def _check_range(offset: int, length: int) -> None:
    if offset < 0 or length < 0:
        raise ValueError(f"offset {offset} and length {length} must not be negative")


def _check_length(uri: str, data: bytes, offset: int, length: int) -> None:
    if len(data) != length:
        raise DataError(
            f"{uri}: has no {length} bytes at offset {offset}, only {len(data)}; "
            "the object is truncated or its index belongs to another version"
        )


@contextmanager
def _clear_errors(uri: str) -> Iterator[None]:
    """Turn what the operating system raises into errors that say what to change."""
    try:
        yield
        ACTIVITY.note_storage()
    except TargetFileError:
        raise  # about another file than the object
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", error.filename or uri) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "the object exists already", uri) from error
    except OSError as error:
        raise explain_disk_error(uri, error) from error
