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


def assign_slots(
    num_micro_batches: int, world: World, ranks_per_micro_batch: int = 1
) -> list[Slot]:
    """List the passes of a rank: slot s of group q of G runs micro-batch s * G + q.

    The g ranks of a group, [q * g, (q + 1) * g), run the same slots. Where G = N / g does not
    divide M, the last slot of some groups reruns the group's first micro-batch with zero weight:
    every rank then takes part in every collective, which ZeRO-2 and 3 require.

    Raises:
        ConfigError: the ranks do not make whole groups, or more groups than micro-batches.
    """
    size, field = ranks_per_micro_batch, "training.ranks_per_micro_batch"
    if world.world_size % size:
        raise ConfigError(
            f"{field}: groups of {size} ranks cannot be made of {world.world_size} train "
            f"worker(s); expected a divisor: change it, or the number of workers"
        )
    num_groups = world.world_size // size
    if num_groups > num_micro_batches:
        raise ConfigError(
            f"{field}: with {size}, {world.world_size} train workers cannot share "
            f"{num_micro_batches} micro-batches per step; expected at most "
            f"{num_micro_batches * size} workers: use fewer, raise {field}, or make "
            f"training.micro_batch_size smaller"
        )
    group = world.rank // size
    slots = []
    for first in range(0, num_micro_batches, num_groups):
        index = first + group
        is_idle = index >= num_micro_batches
        slots.append(Slot(group if is_idle else index, is_idle))
    return slots


def gather_in_order(
    rows: Tensor, num_micro_batches: int, world: World, ranks_per_micro_batch: int = 1
) -> Tensor:
    """Collect one row per micro-batch and member of its group from all ranks.

    Args:
        rows: this rank's values, (slots, ...), one row per slot of `assign_slots`.
        num_micro_batches: M.
        world: rank geometry.
        ranks_per_micro_batch: g.

    Returns:
        (M, g, ...) in the order of micro-batches and members, the same on every rank; idle rows are
        dropped.
    """
    if world.world_size == 1:
        return rows[:, None]
    gathered = [torch.empty_like(rows) for _ in range(world.world_size)]
    dist.all_gather(gathered, rows.contiguous())
    # (slots, N, ...): slot s of group q runs micro-batch s * N / g + q, and rank q * g + j is
    # member j of the group, so that both orders are those of the flattened axes.
    stacked = torch.stack(gathered, dim=1).flatten(0, 1)
    return stacked.unflatten(0, (-1, ranks_per_micro_batch))[:num_micro_batches]
