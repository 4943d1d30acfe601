"""Objects that are made of others, by whoever comes to it: the newest state of those wins."""

from __future__ import annotations

from collections.abc import Callable

from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

_TRIES = 10


def write_derived(storage: Storage, path: str, build: Callable[[], bytes]) -> None:
    """Write what is made of other objects, unless it is there already.

    What is there is read before `build` reads those others, and replaced only if it is still there:
    a process that sleeps in between, and wakes when another one has gone on, never brings back what
    they were before.

    Raises:
        DataError: others write it all the time.
    """
    for _ in range(_TRIES):
        former = read_if_there(storage, path)
        data = build()
        if data == former or try_replace(storage, path, data, former=former):
            return
    raise DataError(
        f"{storage.uri(path)}: other processes write it all the time; use another storage.root for "
        "one of them"
    )


def read_if_there(storage: Storage, path: str) -> bytes | None:
    """Read an object; None: there is none."""
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None


def try_replace(storage: Storage, path: str, data: bytes, *, former: bytes | None) -> bool:
    """Replace an object only if it is what it was, None for one that was not there.

    Returns:
        Whether it has the new bytes now.
    """
    try:
        if former is None:
            storage.create_bytes(path, data)
        else:
            storage.replace_bytes(path, data, former=former)
    except FileExistsError:
        return False
    return True
