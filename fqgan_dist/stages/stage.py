"""What a stage is to whoever runs it: inputs, independent chunks of work, results.

A chunk (see `fqgan_dist.chunks`) is a shard, a view of a shard or a range of ids.
"""

from __future__ import annotations

import importlib
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import ConfigDict

from fqgan_dist.chunks import ProcessLocalCaches, RunChunks
from fqgan_dist.config import Config
from fqgan_dist.devices import configure_torch, select_device
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages import catalog
from fqgan_dist.stages.catalog import StageEntry
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage_record import (
    FOLDER,
    StageRecord,
    flatten,
    has_inputs,
    load_record,
    record_path,
    save_record,
)
from fqgan_dist.storage.scratch import sweep_scratch
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.sweeping import sweep_leftovers
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


class StageOutput(Config):
    """What a finished stage hands to later ones, which read it by its type.

    It is kept in the stage's record; of what another version kept there too, nothing is read.
    """

    model_config = ConfigDict(extra="ignore")

    stage: ClassVar[str]
    """Name of the stage that makes it."""


OutputT = TypeVar("OutputT", bound=StageOutput)


@dataclass(frozen=True)
class StageOutcome:
    """What a finished stage hands to its record."""

    output: StageOutput | None
    """For later stages; None of a rank that writes no record."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Results for the summary, `<stage>/<name>`; equal to the bit for equal inputs."""


@dataclass(frozen=True)
class DataSizes:
    """What a run's images come to: the listed ones, or those of the finished datasets."""

    train_images: int
    val_images: int
    num_classes: int
    val_has_classes: bool = True
    """Whether the validation images have the classes of the training images, not none."""


class StageNotFinishedError(DataError):
    """A stage reads what an earlier one has not made yet."""


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
        names = [item.name for item in fields(self) if item.name != "device"]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # A ConfigError where a GPU is asked for and this process has none.
        device = select_device(state["config"].device, state["world"])
        for name, value in {**state, "device": device}.items():
            object.__setattr__(self, name, value)

    def storage_of(self, stage: str) -> Storage:
        """Return the root where a stage's record and files are: this run's, or another one's."""
        root = self.config.upstream.get(stage)
        return self.storage if root is None else Storage(root)

    def find(self, kind: type[OutputT]) -> OutputT | None:
        """Return what a stage made from the settings of this run; None if it has not finished.

        Raises:
            DataError: its record is damaged.
        """
        try:
            record = find_stage(kind.stage)(self).load_record()
        except StageNotFinishedError:  # not even what that stage reads is there
            return None
        if record is None or not record.is_done:
            return None
        return kind.model_validate(record.outputs)

    def read(self, kind: type[OutputT]) -> OutputT:
        """Return what a finished stage made.

        Raises:
            StageNotFinishedError: it has not finished.
        """
        output = self.find(kind)
        if output is None:
            raise StageNotFinishedError(
                f"{self.storage_of(kind.stage).uri(FOLDER)}: stage {kind.stage!r} has not "
                f"finished; run it first: `fqgan run CONFIG stages=[{kind.stage}]`"
            )
        return output


class RunWork(ProcessLocalCaches):
    """Base of the work of a stage: a process that does it is set up by the run's settings."""

    context: RunContext
    """The run that the work is part of; unpickled, it has chosen the device of its process."""
    local_reason: str | None = None
    """Stages read the run's storage, which all nodes see; see `ChunkWork`."""

    def set_up_process(self, role: str, number: int) -> None:
        config = self.context.config
        configure_torch(config.num_threads, is_deterministic=config.is_deterministic)
        name = f"{role.replace(' ', '-')}-{number:05d}"
        log_file = open_log_file(self.context.storage, name)
        configure_logging(World(), log_file, label=f"{role} {number}")
        sweep_leftovers(sweep_scratch)
        logger.info("%s, device %s", socket.gethostname(), self.context.device)


class Stage(ABC):
    """One stage of the pipeline for one run; the class says what generic code must know of it."""

    output: ClassVar[type[StageOutput]]
    """What it makes."""
    name: ClassVar[str]
    """Of the stage; its output's."""
    inputs: ClassVar[tuple[type[StageOutput], ...]] = ()
    """What it reads of earlier stages, which must have finished."""
    optional_inputs: ClassVar[tuple[type[StageOutput], ...]] = ()
    """What it reads of earlier stages in some runs."""
    runs_in: ClassVar[Literal["driver", "pool", "train_workers"]] = "pool"
    """Where a cluster runs it: in the driver; its chunks in a pool of actors; on train workers."""
    pool: ClassVar[str]
    """Key of its pool under `ray.pools`; its name, if the class says nothing else."""
    uses_device: ClassVar[bool] = True
    """Whether it computes on `device`, which may be a GPU."""
    records: ClassVar[Literal["one", "one_per_inputs", "newest"]] = "one"
    """How many records a run has of it. `one`: other inputs are refused, as files of both would
    mix. `one_per_inputs`: other inputs make another record beside the former. `newest`: it is made
    anew."""
    growing: ClassVar[frozenset[str]] = frozenset()
    """Names of inputs that may grow: a finished stage then goes on from where it is."""
    can_be_taken: ClassVar[bool] = True
    """Whether `upstream` may take it from another run."""

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def __init_subclass__(cls) -> None:
        """Take the name from the output; a base of several stages has none."""
        super().__init_subclass__()
        if hasattr(cls, "output"):
            cls.name = cls.output.stage
            if "pool" not in vars(cls):
                cls.pool = cls.name

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that decide the stage's results, and no others."""

    @abstractmethod
    def upstream(self) -> Mapping[str, Any]:
        """Return the ids of what earlier stages made that this one reads.

        Raises:
            StageNotFinishedError: an earlier stage has not finished.
        """

    @abstractmethod
    def run(self, run_chunks: RunChunks) -> StageOutcome:
        """Do what is not done yet; every process of the world calls it."""

    def has_output(self) -> bool:
        """Whether there is anything that other inputs would contradict: files in its folder."""
        return bool(self.context.storage.list(self.name))

    @classmethod
    def is_wanted(cls, config: RunConfig) -> bool:  # noqa: ARG003  most always are
        """Whether the settings ask for what it makes; a run passes over what nobody wants."""
        return True

    @classmethod
    def uses_pool(cls, config: RunConfig) -> bool:
        """Whether a run on a cluster starts a pool of actors for it."""
        return cls.runs_in == "pool" and cls.name in config.stages and cls.is_wanted(config)

    @classmethod
    def find_problems(cls, config: RunConfig) -> Iterator[str]:  # noqa: ARG003  most have none
        """Yield what is wrong with a run's settings and no validator can see, a line each."""
        yield from ()

    @classmethod
    def find_missing_files(cls, config: RunConfig) -> Iterator[str]:  # noqa: ARG003  most have none
        """Yield what the stage will read and is not there, a line each; buckets are not asked."""
        yield from ()

    @classmethod
    def find_data_problems(
        cls,
        config: RunConfig,  # noqa: ARG003  most need nothing
        sizes: DataSizes,  # noqa: ARG003
    ) -> Iterator[str]:
        """Yield what the stage needs of the images and they do not have, a line each."""
        yield from ()

    def load_record(self) -> StageRecord | None:
        """Read the stage's record for the settings at hand.

        Raises:
            StageNotFinishedError: it depends on what an earlier stage has not made.
            DataError: the record is damaged.
        """
        storage = self.context.storage_of(self.name)
        if self.records != "one_per_inputs":
            return load_record(storage, record_path(self.name))
        inputs = self.collect_inputs()
        record = load_record(storage, self._record_path(inputs))
        if record is None:
            # Runs that were begun when a stage had one record only keep it here.
            former = load_record(storage, record_path(self.name))
            record = former if former is not None and has_inputs(former, inputs) else None
        return record

    def find_record(self) -> StageRecord | None:
        """Read the stage's record, None also where what decides its inputs is not there.

        Raises:
            DataError: the record is damaged.
        """
        try:
            return self.load_record()
        except (StageNotFinishedError, ConfigError):  # an earlier stage, or a file, is missing
            return None

    def save_record(self, record: StageRecord) -> None:
        save_record(self.context.storage, self._record_path(record.inputs), record)

    def list_other_records(self) -> list[StageRecord]:
        """Read the records that the run has of other inputs, the stage's alone.

        Raises:
            DataError: a record is damaged.
        """
        if self.records != "one_per_inputs":
            return []
        storage, folder = self.context.storage, record_path(self.name).removesuffix(".json")
        names = [name for name in storage.list(folder) if name.endswith(".json")]
        paths = [f"{folder}/{name}" for name in names] + [f"{folder}.json"]
        present = self.find_record()
        found = [load_record(storage, path) for path in paths]
        return [record for record in found if record is not None and record != present]

    def collect_inputs(self) -> dict[str, Any]:
        """Return settings and upstream ids, flattened to dotted names.

        Raises:
            StageNotFinishedError: an earlier stage has not finished.
        """
        return flatten({"settings": self.settings(), "upstream": self.upstream()})

    def _record_path(self, inputs: Mapping[str, Any]) -> str:
        is_one_of_many = self.records == "one_per_inputs"
        return record_path(self.name, fingerprint(inputs) if is_one_of_many else None)


def find_stage(name: str) -> type[Stage]:
    return _load(next(entry for entry in catalog.STAGES if entry.name == name))


def find_stages(config: RunConfig) -> list[type[Stage]]:
    """Import the classes of the stages that a run names, in the order in which they run."""
    return [stage for stage in all_stages() if stage.name in config.stages]


def all_stages() -> list[type[Stage]]:
    return [_load(entry) for entry in catalog.STAGES]


def build_stages(context: RunContext) -> list[Stage]:
    """Build all stages of a run, named by its config or not."""
    return [stage(context) for stage in all_stages()]


def _load(entry: StageEntry) -> type[Stage]:
    module, _, name = entry.home.partition(":")
    return getattr(importlib.import_module(module), name)
