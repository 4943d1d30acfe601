"""Hash what is too large to be held in memory."""

from __future__ import annotations

import hashlib
import io
import math
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

    def finish(self, *, max_bytes: int | None = None) -> tuple[str, int]:
        """Read what is left and give the sha256 (hex) and the size of the whole.

        Of a file with more than `max_bytes` one byte more is read: it is not the expected one.
        """
        end = math.inf if max_bytes is None else max_bytes + 1
        while self.num_bytes < end and self.read(int(min(_BLOCK_BYTES, end - self.num_bytes))):
            pass
        return self._hash.hexdigest(), self.num_bytes


def hash_object(storage: Storage, path: str, *, max_bytes: int | None = None) -> tuple[str, int]:
    """Compute the sha256 (hex) and the size in bytes of a stored object.

    Args:
        storage: where it is.
        path: its name there.
        max_bytes: its size as recorded; of a longer one no more than that is hashed.

    Raises:
        FileNotFoundError: there is no such object.
        RefusedObjectError: it is no regular file, or a link out of its root.
    """
    with storage.open_read(path) as stream:
        sha256, num_bytes = HashedStream(stream).finish(max_bytes=max_bytes)
    is_too_long = max_bytes is not None and num_bytes > max_bytes
    return sha256, storage.size(path) if is_too_long else num_bytes
