"""Hash what is too large to be held in memory."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO

from fqgan_dist.storage.storage import Storage

_BLOCK_BYTES = 1 << 22


class HashedStream(io.RawIOBase):
    """Reads a file forwards and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        """Bytes that have passed."""
        self.content_end = 0
        """Where the zeros at the end of what has passed begin."""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        if content := data.rstrip(b"\0"):
            self.content_end = self.num_bytes + len(content)
        self.num_bytes += len(data)
        return data

    def finish(self) -> tuple[str, int]:
        """Read what is left and give the sha256 (hex) and the size of the whole."""
        while self.read(_BLOCK_BYTES):
            pass
        return self._hash.hexdigest(), self.num_bytes


def hash_object(storage: Storage, path: str) -> tuple[str, int]:
    """Compute the sha256 (hex) and the size in bytes of a stored object.

    Raises:
        FileNotFoundError: there is no such object.
    """
    with storage.open_read(path) as stream:
        return HashedStream(stream).finish()
