"""Temporary folders in TMPDIR, which the next process removes where its own was killed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fqgan_dist.storage.leftovers import Swept, is_abandoned
from fqgan_dist.storage.owners import FOREIGN_S, OWNER_PATTERN, name_owner

_NAME = re.compile(rf"fqgan-[a-z-]+-({OWNER_PATTERN})-[a-z0-9_]{{8}}")


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder that is removed at the end, or by `sweep_scratch` after a kill.

    Its name says whose it is. It is locked too: where processes of several containers share a
    TMPDIR, none of them can look for the others.
    """

    def __init__(self, kind: str) -> None:
        """Make it; `kind`, of small letters, says to people what it is for.

        Raises:
            OSError: TMPDIR is full, or cannot be written.
        """
        super().__init__(prefix=f"fqgan-{kind}-{name_owner()}-")
        self._unlock = lock_folder(self.name)

    def cleanup(self) -> None:
        """Remove the folder; a second time is harmless."""
        super().cleanup()
        self._unlock()


def lock_folder(folder: str | Path) -> Callable[[], None]:
    """Hold a lock on a folder until this process ends, or calls what is returned."""
    descriptors = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
    with suppress(OSError):  # not on every network disk; then no sweep gets the lock either
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock() -> None:
        if descriptors:
            os.close(descriptors.pop())

    return unlock


def sweep_scratch() -> Swept:
    """Remove the folders in TMPDIR whose processes were killed.

    Of this host by the process, at once; of another one, or of another container, those that nobody
    holds a lock on and that were not touched for a day.
    """
    swept = Swept()
    root = Path(tempfile.gettempdir())
    for name in _list(root):
        match = _NAME.fullmatch(name)
        folder = root / name
        if match is None or not _is_own(folder):
            continue
        if is_abandoned(match[1], lambda folder=folder: age_s(folder), foreign_s=FOREIGN_S):
            size = measure_folder(folder)
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                swept += Swept(1, size)
    return swept


def _list(root: Path) -> list[str]:
    try:
        return os.listdir(root)
    except OSError:
        return []


def _is_own(folder: Path) -> bool:
    # TMPDIR is everybody's; a link of this name leads elsewhere.
    try:
        return folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    except OSError:
        return False


def age_s(folder: Path) -> float:
    """Give the seconds since anything in a folder was changed; 0 if somebody holds its lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
        newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return 0.0
    return time.time() - newest


def measure_folder(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size
    return size
