"""Run the stages of a pipeline in order, skipping what is done.

The driver is idempotent: all it knows is in the run's storage root, so running it again is how a
run resumes, whatever killed it (design.md section 1).
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import torch

from fqgan_dist.config import dump_config
from fqgan_dist.data.storage import Storage
from fqgan_dist.orchestration.registry import build_stage
from fqgan_dist.stages.config import STAGE_NAMES, RunConfig
from fqgan_dist.stages.manifest import StageRecord, check_inputs, flatten, save_record
from fqgan_dist.stages.stage import ChunkWork, RunContext, Stage, select_device
from fqgan_dist.stages.summary import Summary, load_summary
from fqgan_dist.telemetry.environment import collect_environment
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.progress import render_summary, track
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


def run_pipeline(config: RunConfig, world: World | None = None) -> Summary:
    """Run the configured stages and return the summary.

    Raises:
        FqganError: an input is wrong, a stage was made from other inputs, or a stage failed; what
            was finished before stays.
    """
    world = world or World()
    context = open_run(config, world)
    stages = [build_stage(name, context) for name in STAGE_NAMES if name in config.stages]
    for stage in stages:
        # All static settings are compared before any work starts.
        check_inputs(context.storage, stage.name, _static_inputs(stage))
    _write_run_files(context)
    for stage in stages:
        _run_stage(stage, context)
        _write_summary(context.storage)
    summary = load_summary(context.storage)
    logger.info("summary of %s\n%s", context.storage.root, render_summary(summary))
    return summary


def open_run(config: RunConfig, world: World) -> RunContext:
    """Prepare this process for a run: storage, logging, device, threads.

    Raises:
        DataError: the storage root cannot be written.
        ConfigError: the device is not there.
    """
    storage = Storage(config.storage.root)
    probe = f"probes/rank-{world.rank}"
    storage.write_bytes(probe, b"")  # fails here, not after hours, where the root is read-only
    storage.delete(probe)
    configure_logging(world, storage.local_path("logs"))
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = select_device(config.device, world)
    return RunContext(config=config, storage=storage, world=world, device=device)


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


def _run_stage(stage: Stage, context: RunContext) -> None:
    storage = context.storage
    inputs = _static_inputs(stage) | flatten({"upstream": stage.upstream()})
    record = check_inputs(storage, stage.name, inputs)
    if record is not None and record.state == "done":
        logger.info("%s: already done from the same inputs, skipped", stage.name)
        return
    logger.info("%s: %s", stage.name, "continues" if record else "starts")
    if record is None:
        save_record(storage, StageRecord(stage=stage.name, state="started", inputs=inputs))
    start = time.perf_counter()
    outcome = stage.run(run_chunks_here)
    seconds = time.perf_counter() - start
    save_record(
        storage,
        StageRecord(
            stage=stage.name,
            state="done",
            inputs=inputs,
            outputs=dict(outcome.outputs),
            metrics=dict(outcome.metrics),
            seconds=seconds,
        ),
    )
    logger.info("%s: done in %.0f s", stage.name, seconds)


def _static_inputs(stage: Stage) -> dict[str, Any]:
    return flatten({"settings": stage.settings()})


def _write_run_files(context: RunContext) -> None:
    storage = context.storage
    storage.write_bytes("config.yaml", dump_config(context.config).encode())
    environment = json.dumps(collect_environment(), indent=1, sort_keys=True)
    storage.write_bytes("environment.json", environment.encode())


def _write_summary(storage: Storage) -> None:
    storage.write_bytes("summary.json", json.dumps(load_summary(storage), indent=1).encode())
