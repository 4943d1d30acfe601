"""What spawned loader workers are given: a module that they can import."""

from __future__ import annotations

import atexit
import operator
from collections.abc import Callable
from pathlib import Path


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
