"""Run the stages of a pipeline in order, skipping what is done, wherever each of them runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from fqgan_dist.chunks import run_in_processes
from fqgan_dist.notice import NOTICES
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.data_checks import check_sizes
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.run import (
    check_static_inputs,
    is_stage_done,
    open_run,
    run_stage,
    write_run_files,
    write_summary,
)
from fqgan_dist.stages.shards import DatasetIds, measure_data
from fqgan_dist.stages.stage import RunContext, Stage, build_stages
from fqgan_dist.stages.summary import Summary, load_summary
from fqgan_dist.telemetry.progress import render_summary
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

RunStage = Callable[[Stage], None]
"""Runs one stage that is not done."""


def open_checked_run(config: RunConfig, *, device: torch.device | None = None) -> RunContext:
    """Open a run and check all that can be checked before anything starts.

    Raises:
        FqganError: settings, files or records of the run contradict each other.
    """
    context = open_run(config, World(), device=device)
    check_run(context)
    for stage in build_stages(context):
        # Also of stages that are not run now: their settings are part of what the others read.
        check_static_inputs(stage)
    for stage in _named_stages(context):
        for kind in stage.inputs:
            if kind.stage not in config.stages:  # nobody would make it: say so before hours pass
                context.read(kind)
    return context


def run_stages(
    context: RunContext,
    run_one: RunStage,
    *,
    note_skipped: Callable[[Stage], None] = lambda _: None,
) -> None:
    """Run the configured stages in order by `run_one`, and say so when there was nothing to do.

    `note_skipped` is told of each that is done already.

    Raises:
        NoticeError: notice was given to this process.
    """
    has_run = are_sizes_checked = False
    stages = _named_stages(context)
    for number, stage in enumerate(stages):
        if is_stage_done(stage):
            logger.info("%s: already done from the same inputs, skipped", stage.name)
            note_skipped(stage)
            continue
        if not has_run:
            write_run_files(context)
        has_run = True
        if DatasetIds in stage.inputs and not are_sizes_checked:  # the images are known by now
            check_sizes(map(type, stages[number:]), context.config, measure_data(context))
            are_sizes_checked = True
        run_one(stage)
        write_summary(context)
        NOTICES.raise_if_given()
    if not has_run:
        logger.info("nothing to do: every stage of this run is done already")


def _named_stages(context: RunContext) -> list[Stage]:
    """Build the stages that the run names and wants, in their order."""
    config = context.config
    return [
        stage
        for stage in build_stages(context)
        if stage.name in config.stages and stage.is_wanted(config)
    ]


def run_stage_here(stage: Stage) -> None:
    run_stage(stage, partial(run_in_processes, observer=stage.context.observer))


def finish(context: RunContext) -> Summary:
    summary = load_summary(context)
    logger.info("summary of %s\n%s", context.storage.root, render_summary(summary))
    return summary
