"""Which rank runs which micro-batch, and putting their results back in order.

A global batch is M fixed micro-batches; N ranks share them. Everything that a step reports or keeps
is gathered in micro-batch order first, so that it does not depend on N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fqgan_dist.errors import ConfigError
from fqgan_dist.world import World


@dataclass(frozen=True)
class Slot:
    """One forward and backward pass of a rank in a step."""

    micro_batch: int
    """Index in the global batch, in [0, M)."""
    is_idle: bool
    """Whether the pass only keeps the ranks' collectives in step; it has zero weight."""


def assign_slots(num_micro_batches: int, world: World) -> list[Slot]:
    """List the passes of a rank: slot s of rank r runs micro-batch s * N + r.

    Where N does not divide M, the last slot of some ranks reruns the rank's first micro-batch with
    zero weight: every rank then takes part in every collective, which ZeRO-2 and 3 require.

    Raises:
        ConfigError: more ranks than micro-batches.
    """
    if world.world_size > num_micro_batches:
        raise ConfigError(
            f"{world.world_size} train workers cannot share {num_micro_batches} micro-batches per "
            f"step; use at most {num_micro_batches} workers or a smaller training.micro_batch_size"
        )
    slots = []
    for first in range(0, num_micro_batches, world.world_size):
        index = first + world.rank
        is_idle = index >= num_micro_batches
        slots.append(Slot(world.rank if is_idle else index, is_idle))
    return slots


def gather_in_order(rows: Tensor, num_micro_batches: int, world: World) -> Tensor:
    """Collect one row per micro-batch from all ranks.

    Args:
        rows: this rank's values, (slots, ...), one row per slot of `assign_slots`.
        num_micro_batches: M.
        world: rank geometry.

    Returns:
        (M, ...) in micro-batch order, the same on every rank; idle rows are dropped.
    """
    if world.world_size == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world.world_size)]
    dist.all_gather(gathered, rows.contiguous())
    # (slots, N, ...) flattened is the micro-batch order, because slot s of rank r runs s * N + r.
    return torch.stack(gathered, dim=1).flatten(0, 1)[:num_micro_batches]
