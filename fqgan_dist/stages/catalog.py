"""The stages of a run, in the order in which they run: the one list of them.

A new stage is its module, its settings and a line here. Everything else asks the stage's class,
which is imported when it is needed: reading a config or showing a help text costs no torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fqgan_dist.stages.config import RunConfig
    from fqgan_dist.stages.stage import RunContext, Stage


@dataclass(frozen=True)
class StageEntry:
    """What is known of a stage before its code is imported."""

    name: str
    """In configs, records and paths."""
    command: str
    """The subcommand of `fqgan` that runs it, besides `run`."""
    help: str
    """What the subcommand does; entries of one command share it."""
    home: str
    """Where its class is, `module:Class`: not imported here, as the report stands above stages."""

    def load(self) -> type[Stage]:
        """Import the stage's class."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)


_TRAIN_HELP = "train the tokenizer and the generator, whichever is due"
_SAMPLE_HELP = "draw samples from the generator, and export them where that is asked for"

STAGES: tuple[StageEntry, ...] = (
    StageEntry(
        "shards", "shards", "write the dataset's shards", "fqgan_dist.stages.shards:ShardsStage"
    ),
    StageEntry(
        "teachers",
        "teachers",
        "precompute teacher features",
        "fqgan_dist.stages.teachers:TeachersStage",
    ),
    StageEntry("tokenizer", "train", _TRAIN_HELP, "fqgan_dist.stages.tokenizer:TokenizerStage"),
    StageEntry(
        "codes",
        "codes",
        "extract the codes of the training images",
        "fqgan_dist.stages.codes:CodesStage",
    ),
    StageEntry(
        "autoregressive",
        "train",
        _TRAIN_HELP,
        "fqgan_dist.stages.autoregressive:AutoregressiveStage",
    ),
    StageEntry("samples", "sample", _SAMPLE_HELP, "fqgan_dist.stages.samples:SamplesStage"),
    StageEntry("exports", "sample", _SAMPLE_HELP, "fqgan_dist.stages.exports:ExportsStage"),
    StageEntry(
        "evaluation",
        "evaluate",
        "measure reconstructions and samples",
        "fqgan_dist.stages.evaluation:EvaluationStage",
    ),
    StageEntry("report", "report", "write report.html", "fqgan_dist.report.stage:ReportStage"),
)


def stage_names() -> tuple[str, ...]:
    """Return the names of all stages in the order in which they run."""
    return tuple(entry.name for entry in STAGES)


def find_stage(name: str) -> type[Stage]:
    """Import the class of a stage by its name."""
    return next(entry for entry in STAGES if entry.name == name).load()


def find_stages(config: RunConfig) -> list[type[Stage]]:
    """Import the classes of the stages that a run names, in the order in which they run."""
    return [entry.load() for entry in STAGES if entry.name in config.stages]


def build_stages(context: RunContext) -> list[Stage]:
    """Build all stages of a run, named by its config or not."""
    return [entry.load()(context) for entry in STAGES]
