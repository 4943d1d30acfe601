"""A store in the memory of this process, as one more backend of the library: `memory://bucket/prefix`.

    bucket = open_memory_bucket(monkeypatch)
    Storage(bucket.root).write_bytes("x", b"1")
    assert bucket.objects == {"x": b"1"}

Faster than a folder, and remote as a bucket is: nothing of it has a path.
"""

from __future__ import annotations

import errno
import io
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.storage.download_target import create_target
from fqgan_dist.storage.leftovers import Swept
from fqgan_dist.storage.names import STORES, split_bucket
from fqgan_dist.storage.storage import BACKENDS

SCHEME = "memory"


@dataclass
class MemoryBucket:
    """What a test sees and changes of a bucket."""

    root: str
    objects: dict[str, bytes] = field(default_factory=dict)
    is_refusing: bool = False
    """Whether every access is refused."""
    lock: threading.Lock = field(default_factory=threading.Lock)


_BUCKETS: dict[str, MemoryBucket] = {}
_NUMBERS = itertools.count()


def open_memory_bucket(monkeypatch: pytest.MonkeyPatch) -> MemoryBucket:
    """Make an empty bucket; the scheme is known to the library until the end of the test."""
    monkeypatch.setitem(BACKENDS, SCHEME, MemoryBackend)
    monkeypatch.setitem(STORES, SCHEME, "none at all")
    name = f"bucket-{next(_NUMBERS)}"
    bucket = MemoryBucket(f"{SCHEME}://{name}")
    monkeypatch.setitem(_BUCKETS, name, bucket)
    return bucket


class MemoryBackend:
    """Objects of buckets by `memory://` URIs."""

    num_retries = 0
    waited_s = 0.0

    def size(self, uri: str) -> int:
        """Give an object's size."""
        return len(self._read(uri))

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        """Give a range."""
        return self._read(uri)[offset : None if length is None else offset + length]

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        """Give a range of each object."""
        return [self.read(uri, *span) for uri, span in zip(uris, ranges, strict=True)]

    def open_read(self, uri: str) -> BinaryIO:
        """Open an object."""
        return io.BytesIO(self._read(uri))

    def download(
        self, uri: str, target: Path, progress: Callable[[int], None] | None
    ) -> tuple[str, int]:
        """Copy an object to a file."""
        data = self._read(uri)
        with create_target(target, len(data)) as file:
            file.write(0, data)
            file.hash(0, len(data))
            if progress is not None:
                progress(len(data))
            return file.sha256, len(data)

    def write(self, uri: str, data: bytes | memoryview) -> None:
        """Replace an object."""
        bucket, key = _find(uri)
        bucket.objects[key] = bytes(data)

    def write_file(self, uri: str, source: Path) -> None:
        """Replace an object by a file."""
        self.write(uri, source.read_bytes())

    def create(self, uri: str, data: bytes) -> None:
        """Make a new object."""
        bucket, key = _find(uri)
        with bucket.lock:
            if key in bucket.objects:
                raise FileExistsError(uri)
            bucket.objects[key] = data

    def replace(self, uri: str, former: bytes, data: bytes) -> None:
        """Replace an object of known bytes."""
        bucket, key = _find(uri)
        with bucket.lock:
            if self._read(uri) != former:
                raise FileExistsError(uri)
            bucket.objects[key] = data

    def names(self, uri: str) -> list[str]:
        """List a folder."""
        return list({name.partition("/")[0] for name, _ in self.walk(uri)})

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        """List all below a folder."""
        bucket, key = _find(uri)
        prefix = f"{key}/" if key else ""
        for name, data in sorted(bucket.objects.items(), key=lambda item: item[0].encode()):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), len(data)

    def delete(self, uri: str) -> None:
        """Remove an object."""
        bucket, key = _find(uri)
        bucket.objects.pop(key, None)

    def sweep(self, uri: str, *, is_superseded: bool) -> Swept:
        """Do nothing: an object is written at once."""
        return Swept()

    def _read(self, uri: str) -> bytes:
        bucket, key = _find(uri)
        if key not in bucket.objects:
            raise FileNotFoundError(errno.ENOENT, "no such object", uri)
        return bucket.objects[key]


def _find(uri: str) -> tuple[MemoryBucket, str]:
    """Find an object's bucket and its name there."""
    name, key = split_bucket(uri)
    if name not in _BUCKETS:
        raise DataError(f"{uri}: the bucket does not exist; open it in this process")
    bucket = _BUCKETS[name]
    if bucket.is_refusing:
        raise PermissionError(errno.EACCES, "refused", uri)
    return bucket, key
