"""Running one stage: what every driver does, in one process, under torchrun or on a cluster.

All ranks call these functions; what is written once is written by the main rank.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from fqgan_dist.chunks import RunChunks
from fqgan_dist.config import dump_config
from fqgan_dist.devices import select_device
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.manifest import StageRecord, check_inputs, flatten, load_record, save_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.stage import RunContext, Stage, configure_torch
from fqgan_dist.stages.summary import load_summary
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.environment import collect_environment
from fqgan_dist.telemetry.log_files import open_log_file, publish_log
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.telemetry.summary import format_number
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


def open_run(
    config: RunConfig,
    world: World,
    *,
    process: str = "run",
    observer: Observer | None = None,
    device: torch.device | None = None,
) -> RunContext:
    """Prepare this process for a run: storage, logging, device, threads.

    Args:
        config: the run's settings.
        world: rank geometry.
        process: begins the name of this process's log file, for example a stage.
        observer: watches the stages; None shows progress here.
        device: None takes the configured one.

    Raises:
        DataError: the storage root cannot be written.
        ConfigError: the device is not there.
    """
    storage = Storage(config.storage.root)
    probe = f"probe-rank-{world.rank}"
    storage.write_bytes(probe, b"")  # fails here, not after hours, where the root is read-only
    storage.delete(probe)
    configure_logging(world, open_log_file(storage, f"{process}-rank-{world.rank:05d}"))
    configure_torch(config)
    return RunContext(
        config=config,
        storage=storage,
        world=world,
        device=device or select_device(config.device, world),
        observer=observer or LocalObserver(),
    )


def check_static_inputs(stage: Stage, context: RunContext) -> None:
    """Compare a stage's settings with its record, before any work starts.

    Raises:
        DataError: the stage was made from other settings.
    """
    _find_record(stage, context, _static_inputs(stage))


def is_stage_done(stage: Stage, context: RunContext) -> bool:
    """Whether a stage was finished from the inputs of now.

    Raises:
        DataError: an earlier stage has not finished, or this one was made from other inputs.
    """
    record = _find_record(stage, context, _all_inputs(stage))
    return record is not None and record.state == "done"


def run_stage(stage: Stage, context: RunContext, run_chunks: RunChunks) -> None:
    """Run a stage unless it is done, and write its record last.

    Raises:
        DataError: an earlier stage has not finished, or this one was made from other inputs.
    """
    storage, world = context.storage, context.world
    inputs = _all_inputs(stage)
    record = _find_record(stage, context, inputs)
    # The main rank changes the record below: all must have read the same one before.
    wait_for_ranks(world)
    if record is not None and record.state == "done":
        logger.info("%s: already done from the same inputs, skipped", stage.name)
        return
    logger.info("%s: %s", stage.name, "continues" if record else "starts")
    if (record is None or record.inputs != inputs) and world.is_main:
        save_record(storage, StageRecord(stage=stage.name, state="started", inputs=inputs))
    start = time.perf_counter()
    outcome = stage.run(run_chunks)
    seconds = time.perf_counter() - start
    if world.is_main:
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
    # Nobody reports success, or goes on to a stage that reads the record, before it is there.
    wait_for_ranks(world)
    logger.info("%s: done in %.0f s%s", stage.name, seconds, _describe_metrics(outcome.metrics))
    publish_log()  # a cluster may kill this process as soon as its work is over


def _describe_metrics(metrics: Mapping[str, Any]) -> str:
    """Write the numbers among a stage's metrics on one line."""
    numbers = [
        f"{name.partition('/')[2]} {format_number(value)}"
        for name, value in metrics.items()
        if isinstance(value, int | float)
    ]
    return f": {', '.join(numbers)}" if numbers else ""


def wait_for_ranks(world: World) -> None:
    """Wait until every rank is here."""
    if world.world_size > 1:
        dist.barrier()


def write_run_files(context: RunContext) -> None:
    """Write what the run is made of: its resolved config and its environment."""
    storage = context.storage
    storage.write_bytes("config.yaml", dump_config(context.config).encode())
    environment = json.dumps(collect_environment(), indent=1, sort_keys=True)
    storage.write_bytes("environment.json", environment.encode())


def write_summary(storage: Storage) -> None:
    """Write `summary.json` from the stages' records."""
    storage.write_bytes("summary.json", json.dumps(load_summary(storage), indent=1).encode())


def _find_record(
    stage: Stage, context: RunContext, inputs: Mapping[str, Any]
) -> StageRecord | None:
    """Read a stage's record and compare inputs with it.

    A stage that was started but has written nothing binds nobody: who mistyped a path corrects it
    and goes on.
    """
    record = load_record(context.storage, stage.name)
    if record is None or (record.state == "started" and not _has_output(stage.name, context)):
        return None
    return check_inputs(context.storage, stage.name, inputs)


def _has_output(stage: StageName, context: RunContext) -> bool:
    match stage:
        case "shards":
            return bool(context.storage.list(f"data/{context.config.data.name}"))
        case "teachers":
            return bool(context.storage.list("features"))
        case "tokenizer" | "autoregressive":
            # A log of attempts alone is no checkpoint.
            names = context.storage.list(f"{stage}/checkpoints")
            return any(name.startswith("step-") for name in names)
        case "codes" | "samples" | "evaluation":
            return bool(context.storage.list(stage))
        case "report":
            return context.storage.exists("report.html")


def _all_inputs(stage: Stage) -> dict[str, Any]:
    return _static_inputs(stage) | flatten({"upstream": stage.upstream()})


def _static_inputs(stage: Stage) -> dict[str, Any]:
    return flatten({"settings": stage.settings()})
