"""Files that grow on the local disk and last in the run's storage.

Below a local root they are written in place. An object cannot be appended to: for a bucket they lie
in a temporary folder and are published whole.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.scratch import ScratchFolder
from fqgan_dist.storage.storage import Storage


class PublishedFolder:
    """A folder of the run's storage that is written to on the local disk."""

    def __init__(self, storage: Storage, path: str) -> None:
        """Make the local folder; `close` removes it where it is temporary."""
        self._storage = storage
        self._path = path
        local = storage.local_path(path)
        with clear_disk_errors(local or tempfile.gettempdir()):
            self._temporary = None if local else ScratchFolder("files")
            self.local = local or Path(self._temporary.name if self._temporary else "")
            """Where to write."""
            self.local.mkdir(parents=True, exist_ok=True)

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
