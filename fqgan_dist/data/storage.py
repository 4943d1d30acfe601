"""Storage roots, local directories and S3 buckets, behind one small interface.

All that the system knows of a run lies under one root (design.md section 1). Whole objects are
written at once: a reader sees the former bytes or the new ones, never a part. `create_bytes` is the
one primitive that decides races; commits of checkpoints and datasets rest on it.

S3 is reached through s3fs. The endpoint comes from `AWS_ENDPOINT_URL` and credentials from the
places where AWS tools look (environment, shared files, instance role); a URI never carries them.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from fqgan_dist.data.local_store import LocalBackend
from fqgan_dist.data.storage_names import check_relative_path, check_root
from fqgan_dist.errors import DataError

_REQUEST_ATTEMPTS = 5
"""Tries of one S3 request (botocore "standard" mode: exponential backoff with jitter)."""
_BODY_ATTEMPTS = 3
"""Tries of a whole call when its answer breaks off while the body is read (s3fs's own loop)."""
_READ_AHEAD_BYTES = 8 * 2**20
_PART_BYTES = 50 * 2**20
_CONCURRENT_READS = 32
_BACKOFF_S = 0.2
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60


class Storage:
    """Objects below a root, named by relative POSIX paths such as `tokenizer/metrics.jsonl`.

    Every method raises:
        ValueError: the path is absolute, or has an empty, `.` or `..` part.
        FileNotFoundError: an object that is read is missing.
        DataError: access is refused, or the store cannot be reached after bounded retries.

    Safe to use from several threads, and picklable (spawned loader workers connect for themselves).
    """

    def __init__(self, root: str | Path) -> None:
        """Name a root without touching it.

        Args:
            root: a directory, or `s3://bucket/prefix`. A directory is created at the first write.

        Raises:
            ConfigError: another scheme, an S3 URI without a bucket, or one with credentials.
        """
        self.root = check_root(str(root))

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory of this machine (or one mounted on it)."""
        return not self.root.startswith("s3://")

    def child(self, path: str) -> Storage:
        """Give the storage whose root is a folder of this one; "" is the root itself."""
        return Storage(self.uri(path)) if path else self

    def uri(self, path: str) -> str:
        """Give the full name of an object, for messages and manifests."""
        return f"{self.root}/{check_relative_path(path)}"

    def local_path(self, path: str) -> Path | None:
        """Give the file of an object, or None where the root is a bucket."""
        return Path(self.uri(path)) if self.is_local else None

    def exists(self, path: str) -> bool:
        """Tell whether an object is there."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        """Read an object's size in bytes."""
        uri = self.uri(path)
        with _clear_errors(uri):
            return self._backend.size(uri)

    def read_bytes(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read an object, or exactly `length` bytes of it from `offset`.

        Raises:
            DataError: the object ends before `offset + length`.
        """
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"offset {offset} and length {length} must not be negative")
        if length == 0:
            return b""
        uri = self.uri(path)
        with _clear_errors(uri):
            data = self._backend.read(uri, offset, length)
        if length is not None:
            _check_length(uri, data, offset, length)
        return data

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read many parts at once, from a bucket concurrently.

        Args:
            ranges: path, offset and length of each part.

        Raises:
            DataError: an object ends before the end of a part.
        """
        uris = [self.uri(path) for path, _, _ in ranges]
        parts_of = [(start, size) for _, start, size in ranges]
        try:
            with _clear_errors(self.root):
                parts = self._backend.read_many(uris, parts_of)
        except FileNotFoundError:
            for path in dict.fromkeys(path for path, _, _ in ranges):
                self.size(path)  # its error names the object that is missing
            raise
        for uri, (_, offset, length), data in zip(uris, ranges, parts, strict=True):
            _check_length(uri, data, offset, length)
        return parts

    def open_read(self, path: str) -> BinaryIO:
        """Open an object as a seekable binary stream; the caller closes it."""
        uri = self.uri(path)
        with _clear_errors(uri):
            return self._backend.open_read(uri)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole object, replacing a former one atomically and durably."""
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

        An answer that was lost and retried comes back as "exists" although this call wrote the
        object, so an object with the very same bytes counts as success.

        Raises:
            FileExistsError: an object with other bytes is there.
        """
        uri = self.uri(path)
        with _clear_errors(uri):
            try:
                self._backend.create(uri, data)
            except FileExistsError:
                if self._backend.read(uri, 0, None) != data:
                    raise

    def list(self, prefix: str = "") -> list[str]:
        """List the names of files and folders directly below a folder, sorted; [] if none."""
        uri = self.uri(prefix) if prefix else self.root
        with _clear_errors(uri):
            try:
                return sorted(self._backend.names(uri))
            except (FileNotFoundError, NotADirectoryError) as error:
                if _error_code(error) == "NoSuchBucket":
                    raise
                return []

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""
        uri = self.uri(path)
        with _clear_errors(uri):
            self._backend.delete(uri)

    @cached_property
    def _backend(self) -> _Backend:
        return LocalBackend() if self.is_local else _S3Backend()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.root = state["root"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Storage) and other.root == self.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"


def _check_length(uri: str, data: bytes, offset: int, length: int) -> None:
    if len(data) != length:
        raise DataError(
            f"{uri}: has no {length} bytes at offset {offset}, only {len(data)}; "
            "the object is truncated or its index belongs to another version"
        )


@contextmanager
def _clear_errors(uri: str) -> Iterator[None]:
    """Turn what the operating system and S3 clients raise into errors that say what to change."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if _error_code(error) == "NoSuchBucket":
            raise DataError(f"{uri}: the bucket does not exist; create it or correct it") from error
        raise FileNotFoundError(errno.ENOENT, "no such object", uri) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "the object exists already", uri) from error
    except PermissionError as error:
        raise DataError(
            f"{uri}: access is refused ({error}); "
            "check the file's permissions, or the AWS credentials and their rights"
        ) from error
    except OSError as error:
        raise DataError(
            f"{uri}: cannot be read or written ({error}); "
            "check the disk, or AWS_ENDPOINT_URL and the network"
        ) from error


def _error_code(error: BaseException) -> str:
    """Find the S3 error code behind an exception of s3fs; "" for others."""
    response = getattr(error.__cause__, "response", None)
    return response["Error"].get("Code", "") if isinstance(response, dict) else ""


class _Backend(Protocol):
    """What differs between stores; names are full (a path or an s3:// URI)."""

    def size(self, uri: str) -> int: ...
    def read(self, uri: str, offset: int, length: int | None) -> bytes: ...
    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]: ...
    def open_read(self, uri: str) -> BinaryIO: ...
    def write(self, uri: str, data: bytes) -> None: ...
    def write_file(self, uri: str, source: Path) -> None: ...
    def create(self, uri: str, data: bytes) -> None: ...
    def names(self, uri: str) -> list[str]: ...
    def delete(self, uri: str) -> None: ...


class _S3Backend:
    """A bucket, through s3fs; one connection per process, made at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None

    @property
    def _filesystem(self) -> Any:
        with self._lock:
            if self._connection is None:
                self._connection = _connect()
        return self._connection

    def size(self, uri: str) -> int:
        with _client_errors():
            entry = self._filesystem.info(uri)
        if entry["type"] != "file":
            raise FileNotFoundError(uri)
        return int(entry["size"])

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        end = None if length is None else offset + length
        try:
            return _retry_reads(self._filesystem.cat_file, uri, start=offset or None, end=end)
        except OSError as error:
            if _error_code(error) in ("InvalidRange", "416"):
                return b""  # the object ends before the offset, as at the end of a file
            raise

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        starts = [start for start, _ in ranges]
        ends = [start + size for start, size in ranges]
        return _retry_reads(
            self._filesystem.cat_ranges,
            uris,
            starts,
            ends,
            batch_size=_CONCURRENT_READS,
            on_error="raise",
        )

    def open_read(self, uri: str) -> BinaryIO:
        with _client_errors():
            file = self._filesystem.open(uri, "rb", block_size=_READ_AHEAD_BYTES)
        return cast(BinaryIO, file)

    def write(self, uri: str, data: bytes) -> None:
        self._put(uri, data, mode="overwrite")

    def write_file(self, uri: str, source: Path) -> None:
        with _client_errors():
            self._filesystem.put_file(str(source), uri, chunksize=_PART_BYTES)

    def create(self, uri: str, data: bytes) -> None:
        try:
            self._put(uri, data, mode="create")
        except OSError as error:
            # AWS names the condition and s3fs translates that; Ceph answers the bare code. A 409 is
            # AWS's "another create-only put of this name is under way".
            if _error_code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                raise FileExistsError(uri) from error
            raise

    def _put(self, uri: str, data: bytes, *, mode: str) -> None:
        # A create-only put is always one request: Ceph 16 ignores If-None-Match where a multipart
        # upload is completed, and overwrites (measured).
        part_size = max(_PART_BYTES, len(data)) if mode == "create" else _PART_BYTES
        with _client_errors():
            try:
                self._filesystem.pipe_file(uri, data, mode=mode, chunksize=part_size)
            except FileNotFoundError as error:
                # The retry of a multipart completion whose answer was lost finds the upload gone.
                if _error_code(error) != "NoSuchUpload" or self.read(uri, 0, None) != data:
                    raise

    def names(self, uri: str) -> list[str]:
        prefix = uri.removeprefix("s3://") + "/"
        with _client_errors():
            found: list[str] = self._filesystem.ls(prefix, detail=False, refresh=True)
        names = [name.removeprefix(prefix).rstrip("/") for name in found if name.startswith(prefix)]
        return [name for name in names if name]  # an empty name is a console's folder marker

    def delete(self, uri: str) -> None:
        with _client_errors():
            self._filesystem.rm_file(uri)


def _connect() -> Any:
    import s3fs

    filesystem = s3fs.S3FileSystem(
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
        use_listings_cache=False,  # other processes write here too
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
        },
    )
    filesystem.retries = _BODY_ATTEMPTS
    return filesystem


def _retry_reads(read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Repeat a read whose answer broke off: s3fs retries requests, but not every kind of body."""
    from s3fs.core import S3_RETRYABLE_ERRORS

    for attempt in range(1, _BODY_ATTEMPTS + 1):
        try:
            with _client_errors():
                return read(*args, **options)
        except OSError as error:
            if attempt == _BODY_ATTEMPTS or not isinstance(error.__cause__, S3_RETRYABLE_ERRORS):
                raise
            time.sleep(_BACKOFF_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def _client_errors() -> Iterator[None]:
    """Make the clients' own errors (no credentials, no connection) an OSError like all others."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise PermissionError(str(error)) from error
    except (BotoCoreError, ClientError) as error:
        raise OSError(errno.EIO, str(error)) from error
