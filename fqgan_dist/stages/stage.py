"""What a stage is to whoever runs it: inputs, independent chunks of work, results.

A chunk is a shard, a view of a shard or a range of ids. Processing one is a pure function of the
run's storage and the chunk, and commits its output once; so any process may run any chunk, again
after a kill, in any order (design.md section 1).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch

from fqgan_dist.data.index import DatasetIndex, load_index
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.manifest import StageRecord, load_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.world import World

_CONCURRENT_CHECKS = 32
"""Threads that ask a remote storage, some 20 ms each, which of thousands of chunks are there."""


class ChunkWork(Protocol):
    """A set of independent chunks.

    Picklable: it travels to the processes that work, each of which loads the models at its first
    `process` (see `ProcessLocalCaches`) and chooses its own device (see `RunContext`).
    """

    @property
    def context(self) -> RunContext:
        """The run that the work is part of."""
        ...

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
        """Whether the chunk's output is committed; may be called from several threads at once."""
        ...

    def process(self, chunk: int) -> None:
        """Make and commit the chunk's output, whole or not at all.

        Two processes may do it at once (one was given up too early): both commit the same bytes.

        Raises:
            FqganError: an input is wrong; it would be so in any other process.
        """
        ...


RunChunks = Callable[[ChunkWork], None]
"""Processes every chunk that is not done."""


def find_pending(work: ChunkWork) -> list[int]:
    """List the chunks whose output is not committed, in order."""
    chunks = work.chunks()
    with ThreadPoolExecutor(_CONCURRENT_CHECKS) as threads:
        done = list(threads.map(work.is_done, chunks))
    return [chunk for chunk, is_done in zip(chunks, done, strict=True) if not is_done]


class ProcessLocalCaches:
    """Base of objects that travel without their `cached_property` values.

    What is loaded lazily, networks above all, stays in the process that loaded it.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Give what is pickled."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not isinstance(getattr(type(self), name, None), functools.cached_property)
        }


@dataclass(frozen=True)
class StageOutcome:
    """What a finished stage hands to its record."""

    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Ids and places."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Results for the summary; equal to the bit for equal inputs."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """A run as a stage sees it.

    It pickles without its device: unpickled, it has that of the process it is in.
    """

    config: RunConfig
    storage: Storage
    world: World
    device: torch.device
    observer: Observer = field(default_factory=LocalObserver)
    """Is told how far the stages' work is."""

    def __getstate__(self) -> dict[str, Any]:
        """Give what is pickled."""
        names = [item.name for item in fields(self) if item.name != "device"]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore it in another process.

        Raises:
            ConfigError: a GPU is asked for and this process has none.
        """
        device = select_device(state["config"].device, state["world"])
        for name, value in {**state, "device": device}.items():
            object.__setattr__(self, name, value)

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


def configure_torch(config: RunConfig) -> None:
    """Set up torch in a process of a run, before it computes."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.tokenizer.training.deterministic or config.autoregressive.training.deterministic:
        # cuBLAS reads it at its first use; torch refuses deterministic products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def select_device(name: str, world: World) -> torch.device:
    """Choose the device of a process.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: 'cuda', but torch sees no GPU in this process; use device=auto or device=cpu, "
            "or on a cluster reserve GPUs (ray.train.gpus, ray.pools.<stage>.gpus)"
        )
    return torch.device(name, world.local_rank) if name == "cuda" else torch.device(name)
