"""Who writes a file, told by its name: the next process sees whether that writer still lives.

A name holds the writer's host, process id and start. Not a lock: whether one is seen by other hosts
depends on how a file system was mounted (Lustre with `localflock`, NFS without its lock service),
and nobody can ask that. A name says the same everywhere, and an object of a bucket has one too.

- A writer of this very host (this boot, this pid namespace) is dead if no process has its id, or
  the one that has it started at another moment. That is certain: an id is given again only with
  another start.
- Of another host, another container or an earlier boot nothing can be told from here. Those files
  go by age alone, see `FOREIGN_S`.
"""

from __future__ import annotations

import functools
import os
import re

from fqgan_dist.process_identity import name_host, read_start

FOREIGN_S = 24 * 3600.0
"""Seconds without a change after which what a writer of another host left is taken for dead.

A living one changes what it writes within seconds, and waits for room or for a server with nothing
half-written. If it were stopped for as long and went on, its rename would fail, and no wrong object
come into being.
"""

OWNER_PATTERN = r"[0-9a-f]{12}-[0-9a-f]{1,8}-[0-9a-f]{1,16}"
"""Of what `name_owner` gives; 38 characters at most."""

_OWNER = re.compile(r"([0-9a-f]{12})-([0-9a-f]{1,8})-([0-9a-f]{1,16})")


def name_owner() -> str:
    """Name this process; another one, forked or of another boot, never has the same name."""
    return _name(os.getpid())


@functools.lru_cache(maxsize=1)
def _name(process_id: int) -> str:  # by its id, as a forked process is another one
    return f"{name_host()}-{process_id:x}-{read_start(process_id) or 0:x}"


def is_owner_alive(owner: str) -> bool | None:
    """Whether the process of a name lives; None: it is of another host, and nobody here can tell.

    Raises:
        ValueError: it is no such name.
    """
    match = _OWNER.fullmatch(owner)
    if match is None:
        raise ValueError(f"{owner!r}: no name of a process")
    if match[1] != name_host():
        return None
    process_id, start = int(match[2], 16), int(match[3], 16)
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's: it lives
    now_start = read_start(process_id)
    # What cannot be read may be hidden from us.
    return now_start is None or now_start == start
