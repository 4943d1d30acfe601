"""What spawned loader workers are given: a module that they can import."""

from __future__ import annotations

import atexit
import operator
import time
from collections.abc import Callable
from pathlib import Path

from fqgan_dist.data import decode_limit
from fqgan_dist.data.batch_memory import BatchMemory


class NotesItsEnd:
    """Builds a function, and writes a file where its worker comes to the interpreter's end."""

    def __init__(self, path: Path) -> None:
        """Name the file."""
        self.path = path

    def __setstate__(self, state: dict[str, Path]) -> None:
        """Be unpickled, in a worker that DataLoader has not begun with."""
        self.__dict__ = state
        atexit.register(self.path.touch)

    def __call__(self) -> Callable[[int], int]:
        """Build the function."""
        return operator.neg


class AstrayLoad:
    """Loads keys, but takes forever for one, as a decoder does that has gone astray."""

    def __init__(self) -> None:
        decode_limit.LIMIT_S = 2

    def __call__(self, key: int) -> int:
        with decode_limit.limit_decoding(f"shard.tar: sample '{key}'"):
            time.sleep(600 if key == 5 else 0)
        return key


class FillsPlaces:
    """Builds a function that writes a number to a place of a `BatchMemory`."""

    def __init__(self, memory: BatchMemory) -> None:
        self._memory = memory

    def __call__(self) -> Callable[[tuple[int, int]], int]:
        return self._fill

    def _fill(self, order: tuple[int, int]) -> int:
        number, place = order
        self._memory.view(place)[...] = number
        return number
