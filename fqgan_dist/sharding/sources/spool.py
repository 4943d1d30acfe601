"""A temporary folder: for sources that cannot be read at random where they are, and for results.

Other processes of the machine read its files by their paths. What a killed process leaves of it is
removed by the next one, see `scratch`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fqgan_dist.errors import DataError
from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.scratch import ScratchFolder, sweep_scratch


@contextmanager
def open_spool_folder() -> Iterator[Path]:
    """Make a folder in `TMPDIR` that is removed at the end."""
    sweep_scratch()  # it may hold a whole data set
    with clear_disk_errors(tempfile.gettempdir()):
        folder = ScratchFolder("data")
    with folder as name:
        yield Path(name)


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
