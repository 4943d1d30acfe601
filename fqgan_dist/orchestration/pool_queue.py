"""What an actor pool decides, without Ray: which chunk is next, and how many actors to have."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.config import PoolConfig


class ChunkQueue:
    """Chunks that wait for an actor; those that lost theirs come first again.

    `len` is the number that waits.
    """

    def __init__(self, chunks: Sequence[int], *, description: str, max_failures: int) -> None:
        self._waiting = deque(chunks)
        self._losses: Counter[int] = Counter()
        self._description = description
        self._max_failures = max_failures

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> int:
        return self._waiting.popleft()

    def put_back(self, chunk: int, cause: str, *, counts: bool = True) -> None:
        """Let a chunk that lost its actor wait again, before all others.

        So a chunk that kills its actors is known soon; `counts` tells whether it may be to blame.

        Raises:
            ClusterError: it has lost too many.
        """
        self._losses[chunk] += counts
        if self._losses[chunk] > self._max_failures:
            raise ClusterError(
                f"{self._description}: chunk {chunk} lost its actor {self._losses[chunk]} times, "
                f"the last time to: {cause} - expected at most max_failures_per_chunk = "
                f"{self._max_failures} - reserve more memory or smaller batches if it runs out of "
                f"it, look into the chunk's inputs and the actors' logs, or raise the limit; what "
                f"is finished stays, and the same command goes on"
            )
        self._waiting.appendleft(chunk)


def count_wanted_actors(
    config: PoolConfig, *, waiting: int, busy: int, located: int, present: int
) -> int:
    """Decide how many actors to have, those that are still starting included.

    A pool starts with `min_actors` and asks for `max_actors` once it works and more chunks wait
    than actors are busy. It never asks for more than can be used; of those that run (`located`),
    `min_actors` stay for the work that may follow, so at an empty queue only these and the busy
    ones do. `present` are those that the pool has or has asked for.
    """
    # Nothing is asked for beyond the first actors before they have shown that the work runs.
    is_growing = 0 < busy < waiting
    wanted = config.max_actors if is_growing else max(config.min_actors, present)
    return max(min(wanted, busy + waiting), min(config.min_actors, located))
