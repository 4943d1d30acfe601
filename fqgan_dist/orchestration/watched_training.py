"""A train worker under a watchdog: what hangs in C++ raises nothing, so another thread does."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import ray

from fqgan_dist.activity import ACTIVITY, WatchdogConfig
from fqgan_dist.orchestration.heartbeats import BoardExchange
from fqgan_dist.telemetry.watchdog import Watchdog, WatchedProcess
from fqgan_dist.training.heartbeats import count_collectives
from fqgan_dist.world import World


def run_watched(train: Callable[[], None], config: WatchdogConfig, exchange: BoardExchange) -> None:
    """Train in a thread of its own and wait for its end, or for the watchdog's.

    Raises:
        HangError: nothing moved for too long; the thread is left behind, with the process.
        Exception: what the training raised.
    """
    world = World.from_environment()
    ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        ACTIVITY.enter("its work outside the steps")
        try:
            train()
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            ends.put(error)
        else:
            ends.put(None)

    process = WatchedProcess(
        name=str(world),
        group=exchange.group,
        number=world.rank,
        world_size=world.world_size,
        node=ray.get_runtime_context().get_node_id(),
        exchange=exchange,
        count_collectives=count_collectives,
        end=ends.put,
        warns=False,  # the driver's line tells of all ranks
    )
    with Watchdog(process, config) as watchdog:
        threading.Thread(target=run, name="training", daemon=True).start()
        error = ends.get()
    # What the training raises in a hang that is ended follows from that.
    error = watchdog.hang or error
    if error is not None:
        raise error
