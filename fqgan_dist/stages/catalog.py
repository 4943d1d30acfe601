"""The stages of a run, in the order in which they run: the one list of them.

A new stage is its module, its settings and a line here. Everything else asks the stage's class
(stage.py), which is imported when it is needed: a config or a help text costs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageEntry:
    """What is known of a stage before its code is imported."""

    name: str
    command: str
    """The subcommand of `fqgan` that runs it, besides `run`."""
    help: str
    """What the subcommand does; entries of one command share it."""
    home: str
    """Where its class is, `module:Class`: not imported here, as the report stands above stages."""


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
    return tuple(entry.name for entry in STAGES)
