"""The geometry of the processes that train together, as one value handed down."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank geometry of one training job; never configuration, always decided by the launcher."""

    rank: int = 0
    """Index of this train worker in [0, world_size)."""
    world_size: int = 1
    """Number of train workers."""
    local_rank: int = 0
    """Index of this train worker on its node; selects the GPU."""
    node_rank: int = 0
    """Index of the node."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in [0, {self.world_size})")

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """Read the variables that torchrun and Ray Train set; one process when they are absent."""
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            node_rank=int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", "0"))),
        )

    def __str__(self) -> str:
        return f"rank {self.rank}/{self.world_size} node{self.node_rank}"
