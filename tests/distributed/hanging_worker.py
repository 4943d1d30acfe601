"""A rank that steps in collectives under a watchdog, and hangs as it is told.

torchrun hanging_worker.py FOLDER stop|loader|collective|nothing
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

import torch
import torch.distributed as dist

from fqgan_dist.activity import WatchdogConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.training.heartbeats import watched_rank
from fqgan_dist.training.hooks import mark_steps
from fqgan_dist.world import World

CONFIG = WatchdogConfig(after_s=6, slow_after_s=60, warn_after_s=2)
STEPS, BAD_STEP = 12, 7


def load(how: str) -> Generator[int, None, None]:
    for step in range(1, STEPS + 1):
        if how == "loader" and step == BAD_STEP:
            time.sleep(3600)
        yield step


def main(folder: Path, how: str) -> None:
    dist.init_process_group("gloo")
    world = World.from_environment()
    configure_logging(world, open_log_file(Storage(folder), f"rank-{world.rank}"))
    how = how if world.rank == 1 else ""
    with watched_rank(world, CONFIG):
        for step in mark_steps(load(how), 0):
            if step == BAD_STEP and how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == BAD_STEP and how == "collective":
                time.sleep(3600)
            dist.all_reduce(torch.ones(1))
            time.sleep(0.5)  # so that the last heartbeat is not of the start
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
