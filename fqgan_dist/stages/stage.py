"""What a stage is to whoever runs it: inputs, independent chunks of work, results.

A chunk (see `fqgan_dist.chunks`) is a shard, a view of a shard or a range of ids.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch

from fqgan_dist.chunks import ProcessLocalCaches, RunChunks
from fqgan_dist.data.index import DatasetIndex, load_pinned_index
from fqgan_dist.devices import select_device
from fqgan_dist.errors import DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.manifest import StageRecord, load_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


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
        """Load the index of a split that the `shards` stage wrote.

        Raises:
            DataError: the stage has not finished, or the dataset is another one by now.
        """
        dataset_id = self.require("shards").outputs[split]
        return load_pinned_index(self.storage, self.dataset_prefix(split), dataset_id)

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


class RunWork(ProcessLocalCaches):
    """Base of the work of a stage: a process that does it is set up by the run's settings."""

    context: RunContext
    """The run that the work is part of; unpickled, it has chosen the device of its process."""

    def set_up_process(self, role: str, number: int) -> None:
        """Set up torch, the log file and the console of a fresh process."""
        configure_torch(self.context.config)
        name = f"{role.replace(' ', '-')}-{number:05d}"
        log_file = open_log_file(self.context.storage, name)
        configure_logging(World(), log_file, label=f"{role} {number}")
        logger.info("%s, device %s", socket.gethostname(), self.context.device)


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
