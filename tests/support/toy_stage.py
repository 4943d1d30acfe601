"""A stage that the library does not know: the module, its settings and a line in the list.

It counts the images of every training shard, in a chunk each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from fqgan_dist.chunks import RunChunks
from fqgan_dist.config import Config
from fqgan_dist.data.index import load_samples
from fqgan_dist.stages.catalog import StageEntry
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import RunContext, RunWork, Stage, StageOutcome, StageOutput

ENTRY = StageEntry("toy", "toy", "count the images of every shard", f"{__name__}:ToyStage")


class ToyConfig(Config):
    """What is counted."""

    weight: int = Field(default=1, gt=0)
    """Each image counts as many."""


class ToyRunConfig(RunConfig):
    """A run with one section more."""

    toy: ToyConfig = ToyConfig()


class ToyCounts(StageOutput):
    """The counts."""

    stage = "toy"

    total: int


class ToyStage(Stage):
    """Counts the images of every shard."""

    output = ToyCounts
    inputs = (DatasetIds,)
    records = "one_per_inputs"

    def settings(self) -> Mapping[str, Any]:
        return toy_config(self.context).model_dump()

    def upstream(self) -> Mapping[str, Any]:
        return {"train": self.context.read(DatasetIds).train}

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        work = ToyWork(self.context)
        run_chunks(work)
        total = sum(work.read(chunk) for chunk in work.chunks())
        return StageOutcome(ToyCounts(total=total), {"toy/total": total})


class ToyWork(RunWork):
    """A chunk is a shard."""

    description = "counting"
    unit = "images"

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.weight = toy_config(context).weight
        self.dataset = open_dataset(context, "train")

    def chunks(self) -> Sequence[int]:
        return range(len(self.dataset.index.shards))

    def size(self, chunk: int) -> int:
        return self.dataset.index.shards[chunk].count

    def is_done(self, chunk: int) -> bool:
        return self.context.storage.exists(self._path(chunk))

    def process(self, chunk: int) -> None:
        table = load_samples(self.dataset.folder, self.dataset.index.shards[chunk])
        count = str(len(table) * self.weight).encode()
        self.context.storage.write_bytes(self._path(chunk), count)

    def read(self, chunk: int) -> int:
        return int(self.context.storage.read_bytes(self._path(chunk)))

    def _path(self, chunk: int) -> str:
        return f"toy/{self.weight}/{chunk}"


def toy_config(context: RunContext) -> ToyConfig:
    """Return the stage's section."""
    assert isinstance(context.config, ToyRunConfig), "the run of a toy stage has its section"
    return context.config.toy
