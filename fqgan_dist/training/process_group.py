"""The process group of all ranks, for the time of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fqgan_dist.loss_group import RANK_TIMEOUT
from fqgan_dist.world import World


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the other ranks for a block: NCCL between GPUs, gloo between CPUs.

    One process gets a group of its own, without a network. Where a block of several ranks fails,
    its group stays until the process ends.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] the documented name
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    try:
        yield
    except BaseException:
        # NCCL destroys a group with all of its ranks. After an error the others wait in another
        # collective: this one would wait for them, instead of ending and so ending them.
        if world.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
