"""A storage whose operations fail on command: one alone, all from then on, or after an answer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from fqgan_dist.errors import DataError
from fqgan_dist.storage.leftovers import Swept
from fqgan_dist.storage.storage import Storage

T = TypeVar("T")
Mode = Literal["before", "after", "once"]
"""The n-th operation and all later ones fail; it is done, but its answer lost; it alone fails."""


class Fault:
    """Counts the operations of all storages that share it, and fails from the n-th on."""

    def __init__(self, operation: int | None, mode: Mode = "before") -> None:
        """Choose the operation, from 1 on; None: none fails."""
        self.operation = operation
        self.mode = mode
        self.count = 0
        self._lock = threading.Lock()

    def run(self, operation: Callable[[], T]) -> T:
        """Do an operation, or fail."""
        with self._lock:
            self.count += 1
            position = self.count - (self.operation or sys.maxsize)
        if position == 0 and self.mode == "after":
            operation()
        if position == 0 or (position > 0 and self.mode != "once"):
            raise DataError(f"injected failure of operation {self.operation}")
        return operation()


class FaultyStorage(Storage):
    """A real storage whose operations fail on command."""

    def __init__(self, root: str | Path, fault: Fault) -> None:
        """Name a root; storages of one fault count together."""
        super().__init__(root)
        self._fault = fault

    def child(self, path: str) -> Storage:
        """Give the storage of a folder, with the same fault."""
        child = FaultyStorage(self.uri(path), self._fault)
        child.__dict__["_backend"] = self._backend
        return child

    def size(self, path: str) -> int:
        """Count, and do or fail; as all below."""
        return self._fault.run(lambda: super(FaultyStorage, self).size(path))

    def read_bytes(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """Read."""
        read = super().read_bytes
        return self._fault.run(lambda: read(path, offset=offset, length=length))

    def read_limited(self, path: str, max_bytes: int) -> bytes:
        """Read."""
        return self._fault.run(lambda: super(FaultyStorage, self).read_limited(path, max_bytes))

    def open_read(self, path: str) -> BinaryIO:
        """Open."""
        return self._fault.run(lambda: super(FaultyStorage, self).open_read(path))

    def write_bytes(self, path: str, data: bytes | memoryview) -> None:
        """Write."""
        self._fault.run(lambda: super(FaultyStorage, self).write_bytes(path, data))

    def write_file(self, path: str, source: Path) -> None:
        """Write."""
        self._fault.run(lambda: super(FaultyStorage, self).write_file(path, source))

    def create_bytes(self, path: str, data: bytes) -> None:
        """Create."""
        self._fault.run(lambda: super(FaultyStorage, self).create_bytes(path, data))

    def replace_bytes(self, path: str, data: bytes, *, former: bytes) -> None:
        """Replace."""
        replace = super().replace_bytes
        self._fault.run(lambda: replace(path, data, former=former))

    def list(self, prefix: str = "") -> list[str]:
        """List."""
        return self._fault.run(lambda: super(FaultyStorage, self).list(prefix))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """List all."""
        return self._fault.run(lambda: super(FaultyStorage, self).walk(prefix))

    def delete(self, path: str) -> None:
        """Delete."""
        self._fault.run(lambda: super(FaultyStorage, self).delete(path))

    def sweep(self, path: str = "", *, is_superseded: bool = False) -> Swept:
        """Sweep."""
        sweep = super().sweep
        return self._fault.run(lambda: sweep(path, is_superseded=is_superseded))
