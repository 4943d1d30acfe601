"""The ranks that run one micro-batch together, as one value handed down to what needs all of it.

Ranks [q * g, (q + 1) * g) are group q. Member j holds the j-th of g equal runs of the micro-batch's
images, and the loss of the micro-batch is the mean over members of a member's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fqgan_dist.world import World

# How long ranks wait for each other, as under Ray Train: the main one may be writing a checkpoint,
# and NCCL's own 10 minutes are less than a slow bucket may take.
RANK_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True, eq=False)
class LossGroup:
    """One rank's part in its group; by default a group of its own."""

    member: int = 0
    """Index of this rank in its group, in [0, size)."""
    size: int = 1
    """Ranks in the group, g."""
    process_group: dist.ProcessGroup | None = None
    """How they reach each other; None for a single one."""

    def rows(self, count: int) -> slice:
        """Choose this member's rows of a whole that has `count` of them per member."""
        return slice(self.member * count, (self.member + 1) * count)

    def gather(self, value: Tensor) -> Tensor:
        """Collect a tensor from all members in their order, (g, ...), without gradient."""
        if self.size == 1:
            return value.detach()[None]
        value = value.detach().contiguous()
        gathered = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(gathered, value, group=self.process_group)
        return torch.stack(gathered)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over the members, the same bits on all, without gradient."""
        if self.size == 1:
            return value.detach()
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.process_group)
        return total.div_(self.size)


# A rank that runs whole micro-batches.
ALONE = LossGroup()


def build_loss_group(world: World, size: int) -> LossGroup:
    """Join the groups of `size` ranks, g; every rank of the world must call it.

    With several ranks the process group must be initialised.
    """
    if world.world_size % size:
        raise ValueError(
            f"groups of {size} ranks cannot be made of {world.world_size}; expected a divisor"
        )
    if size == 1:
        return ALONE
    process_group, _ = dist.new_subgroups(group_size=size, timeout=RANK_TIMEOUT)
    return LossGroup(member=world.rank % size, size=size, process_group=process_group)
