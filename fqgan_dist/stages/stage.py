"""What a stage is to whoever runs it: inputs, independent chunks of work, results.

A chunk is a shard, a view of a shard or a range of ids. Processing one is a pure function of the
run's storage and the chunk, and commits its output once; so any process may run any chunk, again
after a kill, in any order (design.md section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fqgan_dist.data.index import DatasetIndex, load_index
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.manifest import StageRecord, load_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.world import World


class ChunkWork(Protocol):
    """A set of independent chunks; picklable, models are loaded at the first `process`."""

    @property
    def description(self) -> str:
        """What is being done, for progress."""
        ...

    @property
    def unit(self) -> str:
        """What `size` counts, in the plural."""
        ...

    def chunks(self) -> Sequence[int]:
        """Return the ids of all chunks."""
        ...

    def size(self, chunk: int) -> int:
        """Return how many units a chunk holds."""
        ...

    def is_done(self, chunk: int) -> bool:
        """Whether the chunk's output is committed."""
        ...

    def process(self, chunk: int) -> None:
        """Make and commit the chunk's output."""
        ...


RunChunks = Callable[[ChunkWork], None]
"""Processes every chunk that is not done."""


@dataclass(frozen=True)
class StageOutcome:
    """What a finished stage hands to its record."""

    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Ids and places."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Results for the summary; equal to the bit for equal inputs."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A run as a stage sees it."""

    config: RunConfig
    storage: Storage
    world: World
    device: torch.device

    def load_dataset(self, split: str) -> DatasetIndex:
        """Load the index of a split that the `shards` stage wrote."""
        self.require("shards")
        return load_index(self.storage, self.dataset_prefix(split))

    def dataset_prefix(self, split: str) -> str:
        """Where a split's shards are, below the root."""
        return f"data/{self.config.data.name}/{split}"

    def require(self, stage: StageName) -> StageRecord:
        """Return the record of a finished stage.

        Raises:
            DataError: it has not finished.
        """
        record = load_record(self.storage, stage)
        if record is None or record.state != "done":
            raise DataError(
                f"{self.storage.uri('manifests')}: stage {stage!r} has not finished; "
                f"run it first (stages=[{stage}] or all stages)"
            )
        return record


class Stage(Protocol):
    """One stage of the pipeline for one run."""

    @property
    def name(self) -> StageName:
        """Name of the stage."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return the settings that decide the stage's results, and no others."""
        ...

    def upstream(self) -> Mapping[str, Any]:
        """Return the ids of what earlier stages made that this one reads.

        Raises:
            DataError: an earlier stage has not finished.
        """
        ...

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        """Do what is not done yet; every process of the world calls it."""
        ...


def select_device(name: str, world: World) -> torch.device:
    """Choose the device of a process.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda', but torch sees no GPU; use device=auto or device=cpu")
    return torch.device(name, world.local_rank) if name == "cuda" else torch.device(name)
