"""Memory for the images of batches, used again as soon as nobody holds a batch any more.

New memory is dear where a batch is megabytes: its pages are given one by one, and zeroed. With it,
the copies into it and messages of several parts, an image of 256x256 took 1.75 ms of CPU time with
two loader workers, without them 1.47.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import deque
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np


class BatchMemory:
    """Equal places for batches of images, which are handed out, filled and handed out again.

    With `is_shared` loader workers that are given it, pickled when they are started, see the same
    memory, so that images are not sent. It lies in no file system: a container's small /dev/shm is
    no limit.
    """

    def __init__(self, shape: tuple[int, ...], places: int, *, is_shared: bool) -> None:
        """Reserve the places; they take no memory before they are used.

        Args:
            shape: of a batch's images, uint8.
            places: how many there are.
            is_shared: whether other processes fill them.
        """
        self._shape = shape
        self._place_bytes = math.prod(shape)
        self._size = max(1, places * self._place_bytes)
        self._descriptor: int | None = None
        if is_shared:
            self._descriptor = os.memfd_create("fqgan-batches")
            os.ftruncate(self._descriptor, self._size)
        self._open()
        # Appending and popping need no lock, which what is called for a freed array may not take.
        # The last that came back is the next to be given: it may still be in a cache.
        self._free = deque(reversed(range(places)))

    def _open(self) -> None:
        self._map = mmap.mmap(-1 if self._descriptor is None else self._descriptor, self._size)

    def take(self) -> int | None:
        """Give a place that nobody holds; None if there is none, and a batch needs its own memory.

        It is free again when the array that `array` gives of it, and all that is made of that
        array, are gone.
        """
        return self._free.pop() if self._free else None

    def array(self, place: int) -> np.ndarray:
        """Give the memory of a place that was taken, of the shape of a batch."""
        array = self.view(place)
        # Tensors, and other arrays, that share an array's memory hold the array.
        weakref.finalize(array, self._free.append, place).atexit = False
        return array

    def view(self, place: int) -> np.ndarray:
        """Give the memory of a place to a process that fills it for the one that took it."""
        return np.ndarray(self._shape, np.uint8, self._map, place * self._place_bytes)

    def close(self) -> None:
        """Leave the memory to the batches in it: it goes with the last of them."""
        del self._map
        if self._descriptor is not None:
            os.close(self._descriptor)

    def __getstate__(self) -> dict[str, Any]:
        assert self._descriptor is not None, "memory that is not shared cannot be sent"
        # Only to a process that is being started, which inherits the descriptor.
        descriptor = DupFd(self._descriptor)
        return {
            "shape": self._shape,
            "place_bytes": self._place_bytes,
            "size": self._size,
            "descriptor": descriptor,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._shape = state["shape"]
        self._place_bytes = state["place_bytes"]
        self._size = state["size"]
        self._descriptor = state["descriptor"].detach()
        self._open()
