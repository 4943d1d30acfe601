"""Run the stages of a pipeline in order, skipping what is done.

The driver is idempotent: all it knows is in the run's storage root, so running it again is how a
run resumes, whatever killed it (design.md section 1).
"""

from __future__ import annotations

import logging

from fqgan_dist.errors import ConfigError
from fqgan_dist.orchestration.registry import build_stage
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.names import STAGE_NAMES
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.run import (
    check_static_inputs,
    open_run,
    run_stage,
    write_run_files,
    write_summary,
)
from fqgan_dist.stages.stage import ChunkWork
from fqgan_dist.stages.summary import Summary, load_summary
from fqgan_dist.telemetry.progress import render_summary, track
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


def run_pipeline(config: RunConfig) -> Summary:
    """Run the configured stages in this process and return the summary.

    Raises:
        ConfigError: a launcher started several processes of it.
        FqganError: an input is wrong, a stage was made from other inputs, or a stage failed; what
            was finished before stays.
    """
    launched = World.from_environment()
    if launched.world_size > 1:
        raise ConfigError(
            f"execution: 'local' runs in one process, and a launcher started "
            f"{launched.world_size}; train with python -m fqgan_dist.training.run CONFIG stage=..."
        )
    context = open_run(config, World())
    stages = [build_stage(name, context) for name in STAGE_NAMES if name in config.stages]
    check_run(context)
    for name in STAGE_NAMES:
        # Also of stages that are not run now: their settings are part of what the others read.
        check_static_inputs(build_stage(name, context), context)
    write_run_files(context)
    for stage in stages:
        run_stage(stage, context, run_chunks_here)
        write_summary(context.storage)
    summary = load_summary(context.storage)
    logger.info("summary of %s\n%s", context.storage.root, render_summary(summary))
    return summary


def run_chunks_here(work: ChunkWork) -> None:
    """Process the pending chunks of some work in this process, with a progress bar."""
    chunks = work.chunks()
    pending = [chunk for chunk in chunks if not work.is_done(chunk)]
    total = sum(work.size(chunk) for chunk in chunks)
    with track(total, work.description, work.unit) as bar:
        bar.advance(total - sum(work.size(chunk) for chunk in pending))
        for chunk in pending:
            work.process(chunk)
            bar.advance(work.size(chunk))
