"""What ranks agree on at every step without waiting for each other: whether to save, or to leave.

Each rank posts its wishes at a step, and learns at the next one what all of them wished then. The
exchange runs beside the step, on CPUs: it is no sync with a GPU, and it costs 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fqgan_dist.loss_group import RANK_TIMEOUT
from fqgan_dist.world import World


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a rank wishes at a step; of all ranks, what any of them wishes."""

    is_save_due: bool = False
    """A checkpoint is due by time."""
    has_notice: bool = False
    """A rank was given notice: save, and leave."""


NONE = Wishes()


class StepAgreement:
    """One rank's part; every rank makes one at the same time, and exchanges at the same steps."""

    def __init__(self, world: World) -> None:
        """Join the other ranks; several have a process group already."""
        self._group: dist.ProcessGroup | None = None
        if world.world_size > 1:
            group = dist.new_group(backend="gloo", timeout=RANK_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup), "every rank is in it"
            self._group = group
        self._posted: tuple[torch.Tensor, dist.Work | None] | None = None

    def exchange(self, wishes: Wishes) -> Wishes:
        """Post what this rank wishes now; return what any rank wished at the last call."""
        agreed = self._take()
        values = torch.tensor([wishes.is_save_due, wishes.has_notice], dtype=torch.int64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._posted = values, work
        return agreed

    def close(self) -> None:
        """Take part in what is under way, and leave the group."""
        self._take()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _take(self) -> Wishes:
        if self._posted is None:
            return NONE
        values, work = self._posted
        self._posted = None
        if work is not None:
            work.wait()
        is_save_due, has_notice = values.tolist()
        return Wishes(is_save_due=bool(is_save_due), has_notice=bool(has_notice))

    def wait_for_all(self) -> None:
        """Wait until every rank has come this far."""
        if self._group is not None:
            dist.barrier(self._group)
