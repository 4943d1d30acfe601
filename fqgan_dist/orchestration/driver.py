"""Run the stages of a pipeline in order, skipping what is done.

The driver is idempotent: all it knows is in the run's storage root, so running it again is how a
run resumes, whatever killed it (design.md section 1).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from fqgan_dist.chunks import ChunkWork, find_pending
from fqgan_dist.errors import ConfigError
from fqgan_dist.orchestration.authentication import ADDRESS_VARIABLE, require_token
from fqgan_dist.orchestration.registry import build_stage
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.names import STAGE_NAMES, StageName
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.run import (
    check_static_inputs,
    is_stage_done,
    open_run,
    run_stage,
    write_run_files,
    write_summary,
)
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.summary import Summary, load_summary
from fqgan_dist.stages.train import join_ranks
from fqgan_dist.telemetry.log_files import publish_log
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.progress import render_summary
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

RunStage = Callable[[StageName, RunContext], None]
"""Runs one stage that is not done."""


def run_pipeline(config: RunConfig) -> Summary:
    """Run the configured stages and return the summary.

    Raises:
        ConfigError: a launcher started several processes of it.
        ClusterError: the cluster cannot run the job.
        FqganError: an input is wrong, a stage was made from other inputs, or a stage failed; what
            was finished before stays.
    """
    launched = World.from_environment()
    if launched.world_size > 1:
        raise ConfigError(
            f"`fqgan` is one driver process, and a launcher started {launched.world_size}; train "
            f"with python -m fqgan_dist.training.run CONFIG stage=..."
        )
    try:
        return _run_on_cluster(config) if config.execution == "ray" else _run_here(config)
    finally:
        publish_log()


def _run_on_cluster(config: RunConfig) -> Summary:
    if not os.environ.get(ADDRESS_VARIABLE):
        require_token()
    # Ray is imported here only, so that a run in one process needs none.
    from fqgan_dist.orchestration.ray_driver import run_on_cluster

    return run_on_cluster(config)


def _run_here(config: RunConfig) -> Summary:
    context = open_checked_run(config)
    with join_ranks(config, context.world):
        run_stages(context, run_stage_here)
    return finish(context)


def open_checked_run(config: RunConfig, *, device: torch.device | None = None) -> RunContext:
    """Open a run and check all that can be checked before anything starts.

    Args:
        config: the run's settings.
        device: of this process; None takes the configured one.

    Raises:
        FqganError: settings, files or records of the run contradict each other.
    """
    context = open_run(config, World(), device=device)
    check_run(context)
    for name in STAGE_NAMES:
        # Also of stages that are not run now: their settings are part of what the others read.
        check_static_inputs(build_stage(name, context), context)
    return context


def run_stages(
    context: RunContext,
    run_one: RunStage,
    *,
    note_skipped: Callable[[StageName], None] = lambda _: None,
) -> None:
    """Run the configured stages in order, and say so when there was nothing to do.

    Args:
        context: the run.
        run_one: runs a stage that is not done.
        note_skipped: is told of each that is.
    """
    has_run = False
    for name in STAGE_NAMES:
        if name not in context.config.stages:
            continue
        if is_stage_done(build_stage(name, context), context):
            logger.info("%s: already done from the same inputs, skipped", name)
            note_skipped(name)
            continue
        if not has_run:
            write_run_files(context)
        has_run = True
        run_one(name, context)
        write_summary(context.storage)
    if not has_run:
        logger.info("nothing to do: every stage of this run is done already")


def run_stage_here(name: StageName, context: RunContext) -> None:
    """Run a stage in this process."""
    run_stage(
        build_stage(name, context), context, lambda work: run_chunks_here(work, context.observer)
    )


def run_chunks_here(work: ChunkWork, observer: Observer) -> None:
    """Process the pending chunks of some work in this process."""
    pending = find_pending(work)
    total = sum(work.size(chunk) for chunk in work.chunks())
    with observer.track(total, work.description, work.unit) as bar:
        bar.skip(total - sum(work.size(chunk) for chunk in pending))
        for chunk in pending:
            work.process(chunk)
            bar.advance(work.size(chunk))


def finish(context: RunContext) -> Summary:
    """Show and return the summary of a run."""
    summary = load_summary(context.storage)
    logger.info("summary of %s\n%s", context.storage.root, render_summary(summary))
    return summary
