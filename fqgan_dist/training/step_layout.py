"""How N ranks share the M micro-batches of a step, as one value handed down.

A global batch is M fixed micro-batches; each is run by one loss group of g ranks. Everything that a
step reports or keeps is gathered in micro-batch order first, so that it does not depend on N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fqgan_dist.errors import ConfigError
from fqgan_dist.loss_group import LossGroup, build_loss_group
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.world import World


@dataclass(frozen=True)
class Slot:
    """One forward and backward pass of a rank in a step."""

    micro_batch: int
    """Index in the global batch, in [0, M)."""
    is_idle: bool
    """Whether the pass only keeps the ranks' collectives in step; it has zero weight."""


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """One rank's part in every step."""

    num_micro_batches: int
    """M, of all ranks together."""
    world: World
    """Rank geometry."""
    loss_group: LossGroup
    """The g ranks that run each of this rank's micro-batches together."""
    slots: tuple[Slot, ...]
    """This rank's passes, in order."""

    @classmethod
    def of(cls, training: TrainingConfig, world: World) -> StepLayout:
        return build_step_layout(
            training.micro_batches_per_step, world, training.ranks_per_micro_batch
        )

    @property
    def micro_batches(self) -> list[int]:
        """Index in the global batch of each slot's micro-batch."""
        return [slot.micro_batch for slot in self.slots]

    def weight(self, slot: Slot) -> float:
        """Return the share of a slot's loss in the global batch's: 1/(M g), or 0 when idle."""
        return 0.0 if slot.is_idle else 1 / (self.num_micro_batches * self.loss_group.size)

    def gather_in_order(self, rows: Tensor) -> Tensor:
        """Collect one row per micro-batch and member of its group from all ranks.

        `rows` (slots, ...) are this rank's. Returns (M, g, ...) in the order of micro-batches and
        members, the same on every rank; idle rows are dropped.
        """
        if self.world.world_size == 1:
            return rows[:, None]
        gathered = [torch.empty_like(rows) for _ in range(self.world.world_size)]
        dist.all_gather(gathered, rows.contiguous())
        # (slots, N, ...): slot s of group q runs micro-batch s * N / g + q, and rank q * g + j is
        # member j of the group, so that both orders are those of the flattened axes.
        stacked = torch.stack(gathered, dim=1).flatten(0, 1)
        return stacked.unflatten(0, (-1, self.loss_group.size))[: self.num_micro_batches]


def build_step_layout(
    num_micro_batches: int, world: World, ranks_per_micro_batch: int = 1
) -> StepLayout:
    """Give this rank its slots and join its loss group; every rank of the world must call it.

    The process group must be initialised if ranks share micro-batches.

    Raises:
        ConfigError: the ranks do not make whole groups, or more groups than micro-batches.
    """
    return StepLayout(
        num_micro_batches=num_micro_batches,
        world=world,
        slots=assign_slots(num_micro_batches, world, ranks_per_micro_batch),
        loss_group=build_loss_group(world, ranks_per_micro_batch),
    )


def assign_slots(
    num_micro_batches: int, world: World, ranks_per_micro_batch: int = 1
) -> tuple[Slot, ...]:
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
    return tuple(slots)


def can_share(training: TrainingConfig, world_size: int) -> bool:
    """Say whether so many ranks can share the steps of a training."""
    try:
        assign_slots(
            training.micro_batches_per_step,
            World(world_size=world_size),
            training.ranks_per_micro_batch,
        )
    except ConfigError:
        return False
    return True
