"""Loss groups whose members are threads of this process: for tests of what they exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fqgan_dist.loss_group import LossGroup

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, eq=False)
class ThreadMember(LossGroup):
    """A member that meets the others at a barrier; counts how often."""

    barrier: threading.Barrier
    board: list[Tensor]
    meetings: list[str] = field(default_factory=list)

    def gather(self, value: Tensor) -> Tensor:
        """Collect a tensor from all members."""
        self.meetings.append("gather")
        return self._exchange(value)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor over the members."""
        self.meetings.append("mean")
        return self._exchange(value).mean(dim=0)

    def _exchange(self, value: Tensor) -> Tensor:
        self.board[self.member] = value.detach().clone()
        self.barrier.wait()
        gathered = torch.stack(self.board)
        self.barrier.wait()  # nobody writes again before all have read
        return gathered


def run_members(work: Callable[[ThreadMember], ResultT], size: int) -> list[ResultT]:
    """Call `work` for every member of a group at the same time, and return what they return."""
    barrier = threading.Barrier(size, timeout=30)
    board = [torch.empty(0)] * size
    members = [
        ThreadMember(member=member, size=size, barrier=barrier, board=board)
        for member in range(size)
    ]

    def run(member: ThreadMember) -> ResultT:
        try:
            return work(member)
        except BaseException:
            barrier.abort()  # the others must not wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, members))
