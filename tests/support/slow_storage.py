"""Storages whose writes do not return, or fail in ways of their own; for other processes, too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fqgan_dist.storage.storage import Storage
from fqgan_dist.waiting import WAITS

GO = "go"


class WaitingStorage(Storage):
    """Writes wait, and say so, until a file `go` is in the root."""

    def write_bytes(self, path: str, data: Any) -> None:
        """Wait, and write."""
        with WAITS.during("a test"):
            while not (Path(self.root) / GO).exists():
                time.sleep(0.02)
        super().write_bytes(path, data)


class StrangeError(Exception):
    """One that does not travel: it wants two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class StrangeStorage(Storage):
    """Writes fail with an error that cannot be sent to another process."""

    def write_bytes(self, path: str, data: Any) -> None:
        """Fail."""
        raise StrangeError("what is", " strange")
