"""What writers that were killed have left, and how much of it was removed.

Nothing here is seen by readers: parts of files that have not got their name yet, uploads that were
never completed, probes, folders in TMPDIR. Whose they are stands in their names, see `owners`.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fqgan_dist.storage.owners import FOREIGN_S, OWNER_PATTERN, is_owner_alive, name_owner

MarkKind = Literal["probe-driver", "doctor"]

_DAY_S = 24 * 3600.0
_FOREIGN_S: dict[str, float] = {
    # It stays as long as its driver, which may be weeks.
    "probe-driver": 30 * _DAY_S,
    "doctor": FOREIGN_S,
}
_MARK = re.compile(rf"({'|'.join(_FOREIGN_S)})-({OWNER_PATTERN})-([0-9a-f]{{1,12}})-[0-9a-f]{{8}}")
_PROBE_OF_RANK = re.compile(r"probe-rank-[0-9]{1,9}")


@dataclass(frozen=True)
class Swept:
    """How much was removed."""

    files: int = 0
    """Files, folders of TMPDIR and unfinished uploads."""
    bytes: int = 0
    """What they held."""

    def __add__(self, other: Swept) -> Swept:
        return Swept(self.files + other.files, self.bytes + other.bytes)


def is_abandoned(owner: str | None, age_s: Callable[[], float], *, foreign_s: float) -> bool:
    """Whether nobody writes something any more.

    Args:
        owner: who made it; None: its name does not say.
        age_s: seconds since it was changed, asked only where its owner does not tell.
        foreign_s: the age of what another host has left.
    """
    is_alive = None if owner is None else is_owner_alive(owner)
    return age_s() >= foreign_s if is_alive is None else not is_alive


def name_mark(kind: MarkKind) -> str:
    """Name an object or folder of a storage root that this process removes when it is done."""
    return f"{kind}-{name_owner()}-{int(time.time()):x}-{secrets.token_hex(4)}"


def name_probe_of_rank(rank: int) -> str:
    """Name what a rank writes and removes at once, to see whether it may."""
    return f"probe-rank-{rank}"


def is_abandoned_mark(name: str) -> bool:
    """Whether a name in a storage root is a mark that its process will not remove any more.

    Its age is by its name: not every store says when an object was written. A rank's probe may go
    at any time: nobody reads it, and its rank does not mind that it is gone.
    """
    if _PROBE_OF_RANK.fullmatch(name):
        return True
    match = _MARK.fullmatch(name)
    if match is None:
        return False
    began = int(match[3], 16)
    return is_abandoned(match[2], lambda: time.time() - began, foreign_s=_FOREIGN_S[match[1]])
