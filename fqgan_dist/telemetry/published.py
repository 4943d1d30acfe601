"""Files that grow on the local disk and last in the run's storage.

Below a local root they are written in place. An object cannot be appended to: for a bucket they lie
in a temporary folder and are published whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import JsonLinesWriter


class PublishedFolder:
    """A folder of the run's storage that is written to on the local disk."""

    def __init__(self, storage: Storage, path: str) -> None:
        """Make the local folder; `close` removes it where it is temporary."""
        self._storage = storage
        self._path = path
        local = storage.local_path(path)
        with clear_disk_errors(local or tempfile.gettempdir()):
            self._temporary = None if local else tempfile.TemporaryDirectory(prefix="fqgan-files-")
            self.local = local or Path(self._temporary.name if self._temporary else "")
            """Where to write."""
            self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Bring a file that a former session published."""
        path = f"{self._path}/{name}"
        if self._temporary and self._storage.exists(path):
            (self.local / name).write_bytes(self._storage.read_bytes(path))

    def publish(self) -> None:
        """Bring all files to the storage, where that is elsewhere."""
        if self._temporary is None:
            return
        for file in sorted(self.local.rglob("*")):
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(self.local).as_posix()
                self._storage.write_bytes(f"{self._path}/{name}", file.read_bytes())

    def close(self) -> None:
        """Remove what is temporary; closing twice is harmless."""
        if self._temporary is not None:
            self._temporary.cleanup()


class PublishedRecords:
    """A file of JSON lines in the run's storage, which a resumed run continues."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self._path = PurePosixPath(path)
        self._opened: tuple[PublishedFolder, JsonLinesWriter] | None = None

    def open(self, resumed_step: int) -> Path:
        """Open the file as it was after a step, and return where it lies on the local disk."""
        folder = PublishedFolder(self._storage, str(self._path.parent))
        folder.fetch(self._path.name)
        local = folder.local / self._path.name
        self._opened = folder, JsonLinesWriter(local, resumed_step=resumed_step)
        return local

    @property
    def num_records(self) -> int:
        return self._writer.num_records

    def write(self, record: Mapping[str, Any]) -> None:
        self._writer.write(record)

    def flush(self) -> None:
        """Bring everything written so far to the disk, and from there to the storage."""
        self._writer.flush()
        self._folder.publish()

    def close(self) -> None:
        if self._opened is not None:
            self._writer.close()
            self._folder.close()

    @property
    def _folder(self) -> PublishedFolder:
        assert self._opened is not None, "not opened"
        return self._opened[0]

    @property
    def _writer(self) -> JsonLinesWriter:
        assert self._opened is not None, "not opened"
        return self._opened[1]
