"""Which class runs which stage."""

from __future__ import annotations

from collections.abc import Callable

from fqgan_dist.report.stage import ReportStage
from fqgan_dist.stages.autoregressive import AutoregressiveStage
from fqgan_dist.stages.codes import CodesStage
from fqgan_dist.stages.evaluation import EvaluationStage
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.samples import SamplesStage
from fqgan_dist.stages.shards import ShardsStage
from fqgan_dist.stages.stage import RunContext, Stage
from fqgan_dist.stages.teachers import TeachersStage
from fqgan_dist.stages.tokenizer import TokenizerStage

_STAGES: dict[StageName, Callable[[RunContext], Stage]] = {
    "shards": ShardsStage,
    "teachers": TeachersStage,
    "tokenizer": TokenizerStage,
    "codes": CodesStage,
    "autoregressive": AutoregressiveStage,
    "samples": SamplesStage,
    "evaluation": EvaluationStage,
    "report": ReportStage,
}


def build_stage(name: StageName, context: RunContext) -> Stage:
    """Build a stage of a run."""
    return _STAGES[name](context)
