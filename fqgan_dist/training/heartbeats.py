"""Heartbeats of ranks that no cluster watches: through the store that they met at.

Under torchrun that store lives in its agent, which no rank can stop; started otherwise it lives in
rank 0, whose silence is then noticed by the silence of the store.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # what `dist` gives

from fqgan_dist.activity import WatchdogConfig
from fqgan_dist.telemetry.standstill import Heartbeat, HeartbeatTable, Standstill
from fqgan_dist.telemetry.watchdog import Exchange, Watchdog, WatchedProcess
from fqgan_dist.world import World

_STORE_TIMEOUT = timedelta(seconds=5)


@contextmanager
def watched_rank(world: World, config: WatchdogConfig) -> Iterator[None]:
    """Watch this rank during a block; it ends with exit code 75 if nothing moves for too long.

    With several ranks, the process group must be there.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    process = WatchedProcess(
        name=str(world),
        group=f"attempt {attempt}",
        number=world.rank,
        world_size=world.world_size,
        exchange=_open_exchange(world, attempt) if world.world_size > 1 else None,
        count_collectives=count_collectives,
        ends_others=True,
        warns=world.is_main,
    )
    with Watchdog(process, config):
        yield


def count_collectives() -> int | None:
    """Count the collectives that this rank has entered, over all groups; None: nobody knows."""
    if not dist.is_initialized():
        return None
    groups = getattr(getattr(dist.distributed_c10d, "_world", None), "pg_map", {})
    try:
        return sum(group._get_sequence_number_for_group() for group in tuple(groups))
    except (AttributeError, RuntimeError):  # not public: other backends and releases have none
        return None


def _open_exchange(world: World, attempt: str) -> Exchange:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # A connection of its own: another's lock may be held by a rank that waits in it.
    store = TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
    return StoreExchange(PrefixStore(f"watchdog/{attempt}", store), world)


class StoreExchange:
    """Puts a rank's heartbeats into a store and judges all ranks' by the newest there."""

    def __init__(
        self, store: Store, world: World, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin with nobody heard."""
        self._store = store
        self._world = world
        self._table = HeartbeatTable(clock=clock)
        self._counts: dict[int, int] = {}
        self._num_sent = 0

    def __call__(self, heartbeat: Heartbeat) -> Standstill | None:
        """Send one and judge; raises and may block as the store does."""
        self._num_sent += 1
        content = json.dumps({"count": self._num_sent, "heartbeat": heartbeat.to_json()})
        self._store.set(str(self._world.rank), content)
        for rank in range(self._world.world_size):
            if self._store.check([str(rank)]):
                self._take(rank, json.loads(self._store.get(str(rank))))
        return self._table.judge(heartbeat.group)

    def _take(self, rank: int, content: dict[str, object]) -> None:
        # What has been seen before is no new sign of life.
        count, values = content["count"], content["heartbeat"]
        assert isinstance(count, int)
        assert isinstance(values, dict)
        if self._counts.get(rank) != count:
            self._counts[rank] = count
            self._table.receive(Heartbeat.of_json(values))
