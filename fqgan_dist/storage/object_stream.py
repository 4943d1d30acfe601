"""A seekable stream over range reads, with read-ahead where it is read in order."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_FIRST_BLOCK_BYTES = 2**20
_BLOCK_BYTES = 8 * 2**20
# Blocks in flight or waiting to be read: at most 32 MiB.
_MAX_BLOCKS = 4

RangeReader = Callable[[int, int], "Future[bytes]"]
"""Starts to read (offset, size); the result raises what a reader of the stream should see."""


@dataclass(frozen=True)
class _Block:
    start: int
    end: int
    data: Future[bytes]


class ObjectStream(io.RawIOBase):
    """An object as a raw file. Wrap it in a BufferedReader; not safe for several threads.

    After a seek one small block is read. If reading goes on from there, the next blocks, growing,
    are asked for ahead, so that several connections share the work.
    """

    def __init__(self, read_range: RangeReader, size: int) -> None:
        super().__init__()
        self._read_range = read_range
        self._size = size
        self._position = 0
        self._blocks: deque[_Block] = deque()
        self._asked_to = 0
        self._block_bytes = _FIRST_BLOCK_BYTES
        self._num_blocks = 1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"position {origin + offset} must not be negative")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read up to the end of the block at the position; 0 bytes at the end of the object."""
        view = memoryview(buffer).cast("B")
        if self._position >= self._size or not view:
            return 0
        block = self._find_block()
        try:
            data = block.data.result()
        except BaseException:
            self._forget_blocks()  # whoever reads on after an error asks anew
            raise
        start = self._position - block.start
        count = min(len(view), len(data) - start)
        view[:count] = data[start : start + count]
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._forget_blocks()
        super().close()

    def _find_block(self) -> _Block:
        """Give the block at the position; ask for it and for those that come next."""
        # Within what was asked for, its end included, is reading on; anything else is a seek.
        if not self._blocks or not self._blocks[0].start <= self._position <= self._asked_to:
            self._forget_blocks()
        while self._blocks and self._blocks[0].end <= self._position:
            self._blocks.popleft()
            self._num_blocks = _MAX_BLOCKS  # it was read to its end: reading in order pays now
        while len(self._blocks) < self._num_blocks and self._asked_to < self._size:
            end = min(self._asked_to + self._block_bytes, self._size)
            data = self._read_range(self._asked_to, end - self._asked_to)
            self._blocks.append(_Block(self._asked_to, end, data))
            self._asked_to = end
            self._block_bytes = min(2 * self._block_bytes, _BLOCK_BYTES)
        return self._blocks[0]

    def _forget_blocks(self) -> None:
        for block in self._blocks:
            block.data.cancel()
        self._blocks.clear()
        self._asked_to = self._position
        self._block_bytes = _FIRST_BLOCK_BYTES
        self._num_blocks = 1
