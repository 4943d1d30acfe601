"""A storage that remembers what was read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from fqgan_dist.storage.storage import Storage


class CountedReads:
    """Stands before a backend; of an object that is opened as a stream all bytes count."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.reads: list[tuple[str, int, int]] = []
        """Object, first byte, number of bytes."""

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        data = self._backend.read(uri, offset, length)
        self.reads.append((uri, offset, len(data)))
        return data

    def open_read(self, uri: str) -> BinaryIO:
        self.reads.append((uri, 0, self._backend.size(uri)))
        return self._backend.open_read(uri)

    def num_bytes(self, suffix: str = ".safetensors") -> int:
        return sum(count for uri, _, count in self.reads if uri.endswith(suffix))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def count_reads(root: Path | str) -> tuple[Storage, CountedReads]:
    """Give a storage, and what counts what is read of it and of its children."""
    storage = Storage(root)
    counted = CountedReads(storage._backend)
    storage.__dict__["_backend"] = counted
    return storage, counted
