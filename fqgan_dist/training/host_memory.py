"""Host memory that a GPU copies to and that another process can map."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Any

import torch


class HostMemory:
    """Memory without a name: it goes with the last process that holds it, however that ends."""

    def __init__(self, num_bytes: int, *, is_pinned: bool) -> None:
        """Allocate it, pinned for copies of a GPU if that is asked for.

        Raises:
            RuntimeError: CUDA cannot pin so much.
        """
        # No room of /dev/shm, which containers limit to 64 MB, is taken.
        self.descriptor = os.memfd_create("fqgan-checkpoint")
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, num_bytes)
        self._map = mmap.mmap(self.descriptor, num_bytes)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        """(num_bytes,) uint8."""
        if is_pinned:
            address = self.tensor.data_ptr()
            runtime: Any = torch.cuda.cudart()
            torch.cuda.check_error(int(runtime.cudaHostRegister(address, num_bytes, 0)))
            weakref.finalize(self, runtime.cudaHostUnregister, address)

    @property
    def view(self) -> memoryview:
        """Its bytes, without a copy."""
        return memoryview(self._map)
