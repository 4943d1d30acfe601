"""A temporary folder: for sources that cannot be read at random where they are, and for results.

Other processes of the machine read its files by their paths. The kernel drops the lock on the
folder when its owner dies, however it dies; the next one removes what was left.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fqgan_dist.errors import DataError
from fqgan_dist.storage.disk_errors import clear_disk_errors

_PREFIX = "fqgan-data-"
_LOCK_NAME = "lock"
_YOUNG_S = 60
"""A folder of this age may not be locked yet by the process that just made it."""


@contextmanager
def open_spool_folder() -> Iterator[Path]:
    """Make a folder in `TMPDIR` that is removed at the end."""
    # Only a lock tells: a process that was killed by SIGKILL removes nothing, and its id may be
    # another's by now.
    _remove_leftovers(Path(tempfile.gettempdir()))
    with clear_disk_errors(tempfile.gettempdir()):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with (folder / _LOCK_NAME).open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_spool_file(path: Path, blocks: Iterable[bytes], *, uri: str) -> None:
    """Write a file of a spool folder.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    iterator = iter(blocks)
    with clear_disk_errors(path):
        file = path.open("wb")
    with file:
        # What reads the source has errors of its own, which are no errors of this disk.
        while (block := next(iterator, None)) is not None:
            try:
                file.write(block)
                file.flush()  # so that a full disk shows here
            except OSError as error:
                raise DataError(
                    f"{uri}: cannot be unpacked to {path.parent} ({error}); "
                    "set TMPDIR to a folder with room for all of its images"
                ) from error


def _remove_leftovers(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            facts = folder.lstat()
            if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < _YOUNG_S:
                continue
            with (folder / _LOCK_NAME).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, of another user, or just removed by another process
            continue
