"""Find what occurs twice among millions of keys or digests, in 8 bytes for each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cached_property

import numpy as np


class RepeatFinder:
    """Remembers the hashes of values; a second pass over the suspects alone tells the truth.

    12 million keys as Python text would take 1.5 GB; their hashes take 96 MB. Equal values have
    equal hashes in one process; 12 million different ones share one with a chance of 4e-6.
    """

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, values: Iterable[Hashable]) -> None:
        """Take values of one shard."""
        # Python's own hash: salted in each process, so that nobody can prepare keys that all
        # collide.
        self._hashes.append(np.fromiter(map(hash, values), np.int64))

    def is_suspect(self, value: Hashable) -> bool:
        """Whether a value may have been added more than once; nothing may be added after it."""
        return hash(value) in self._repeated

    @property
    def has_suspects(self) -> bool:
        """Whether any value may have been added more than once."""
        return bool(self._repeated)

    @cached_property
    def _repeated(self) -> frozenset[int]:
        if not self._hashes:
            return frozenset()
        hashes = np.sort(np.concatenate(self._hashes))
        return frozenset(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
