"""At the start of a process: removing what killed ones have left, in one line of the log.

What is left where, and how it is known to be nobody's: `owners`, `leftovers`, `scratch`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fqgan_dist.errors import FqganError
from fqgan_dist.storage.leftovers import Swept, is_abandoned_mark
from fqgan_dist.storage.storage import Storage

logger = logging.getLogger(__name__)


Sweep = Callable[[], Swept]


@dataclass(frozen=True)
class SweepReport:
    """What sweeps did."""

    swept: Swept
    problems: tuple[str, ...]

    def log(self) -> None:
        """Say it; nothing where there was nothing to do."""
        for problem in self.problems:
            logger.warning("some of what killed processes have left stays there: %s", problem)
        if self.swept.files:
            logger.info(
                "removed what killed processes had left: %d files, %.1f MB",
                self.swept.files,
                self.swept.bytes / 1e6,
            )


def sweep_all(sweeps: Sequence[Sweep]) -> SweepReport:
    """Do sweeps one after the other; none of them stops anything."""
    swept = Swept()
    problems: list[str] = []
    for sweep in sweeps:
        try:
            swept += sweep()
        except (FqganError, OSError) as error:
            problems.append(str(error))
    return SweepReport(swept, tuple(problems))


def sweep_leftovers(*sweeps: Sweep) -> None:
    """Do sweeps and say how much they removed."""
    sweep_all(sweeps).log()


def sweep_root(storage: Storage, folder: str = "") -> Swept:
    """Remove what killed processes have left in a run's root, or in one of its folders.

    Raises:
        DataError: the storage refuses it, or cannot be reached.
    """
    swept = storage.sweep(folder)
    if folder:
        return swept
    for name in storage.list():
        if is_abandoned_mark(name):
            swept += _delete(storage, name)
    return swept


def _delete(storage: Storage, name: str) -> Swept:
    """Delete an object, or a folder with all that is in it."""
    swept = Swept()
    for inner, size in list(storage.walk(name)):
        storage.delete(f"{name}/{inner}")
        swept += Swept(1, size)
    storage.delete(name)
    folder = storage.local_path(name)
    if folder is not None and folder.is_dir() and not folder.is_symlink():
        swept += storage.sweep(name, is_superseded=True)
        folder.rmdir()
    return swept if swept.files else Swept(1)
