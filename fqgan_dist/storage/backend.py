"""What a store must do to stand behind `Storage`.

A new one is a module with a class of this shape, a line in `names.STORES`, one in
`storage.BACKENDS`, and a line in the tests, which applies the promises of
`tests/support/storage_contract.py` to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from fqgan_dist.storage.leftovers import Swept


class Backend(Protocol):
    """What differs between stores. Made once for a root and its children, used by many threads.

    Names are full: an absolute path, or `scheme://bucket/key`. Every method raises either an
    OSError that `Storage` can explain (FileNotFoundError for a missing object, PermissionError for
    a refusal) or a DataError that says by itself what to change. Requests are repeated here.
    """

    @property
    def num_retries(self) -> int:
        """Requests that were made again."""
        ...

    @property
    def waited_s(self) -> float:
        """Seconds in which requests waited to be made again."""
        ...

    def size(self, uri: str) -> int:
        """Read an object's size; a folder is no object."""
        ...

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        """Read a range, or to the end where `length` is None; less than asked for at the end."""
        ...

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        """Read (offset, length) of each object, concurrently where that helps."""
        ...

    def open_read(self, uri: str) -> BinaryIO:
        """Open an object as a seekable stream of one version of it."""
        ...

    def download(
        self, uri: str, target: Path, progress: Callable[[int], None] | None
    ) -> tuple[str, int]:
        """Copy an object into a `create_target`; give its sha256 and size."""
        ...

    def write(self, uri: str, data: bytes | memoryview) -> None:
        """Replace an object at once: a reader sees the former bytes or the new ones."""
        ...

    def write_file(self, uri: str, source: Path) -> None:
        """Replace an object by a local file of any size."""
        ...

    def create(self, uri: str, data: bytes) -> None:
        """Make a new object; FileExistsError where the name is taken, by a lost try of ours too."""
        ...

    def replace(self, uri: str, former: bytes, data: bytes) -> None:
        """Replace an object that has certain bytes; FileExistsError where it has others."""
        ...

    def names(self, uri: str) -> list[str]:
        """List the names of objects and folders directly below a folder, in any order."""
        ...

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        """List all objects below a folder: relative names, sorted by their bytes, and sizes."""
        ...

    def delete(self, uri: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...

    def sweep(self, uri: str, *, is_superseded: bool) -> Swept:
        """Remove what writers that were killed left unseen in a folder and below it.

        Never what a living one writes: see `owners`; where its objects are not wanted any more
        (`is_superseded`), that too.
        """
        ...
