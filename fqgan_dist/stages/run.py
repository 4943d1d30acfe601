"""Running one stage: what every driver does, in one process, under torchrun or on a cluster.

All ranks call these functions; what is written once is written by the main rank.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fqgan_dist.chunks import RunChunks
from fqgan_dist.config import dump_config
from fqgan_dist.data.cache_folder import CacheFolder
from fqgan_dist.devices import configure_torch, select_device
from fqgan_dist.errors import DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import RunContext, Stage
from fqgan_dist.stages.stage_record import (
    StageRecord,
    check_inputs,
    flatten,
    has_inputs,
    record_path,
    set_aside_damaged_records,
)
from fqgan_dist.stages.summary import load_summary
from fqgan_dist.storage.derived import write_derived
from fqgan_dist.storage.leftovers import Swept, name_probe_of_rank
from fqgan_dist.storage.scratch import sweep_scratch
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.sweeping import sweep_all, sweep_root
from fqgan_dist.telemetry.environment import collect_environment
from fqgan_dist.telemetry.log_files import open_log_file, publish_log
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.telemetry.summary import format_number
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


_RUN = "run"
"""Process of a run's driver; others are named by their stage."""


def open_run(
    config: RunConfig,
    world: World,
    *,
    process: str = _RUN,
    observer: Observer | None = None,
    device: torch.device | None = None,
) -> RunContext:
    """Prepare this process for a run: storage, logging, device, threads.

    `process` begins the name of its log file. Without an observer progress is shown here; without
    a device it is the configured one.

    Raises:
        DataError: the storage root cannot be written.
        ConfigError: the device is not there.
    """
    storage = Storage(config.storage.root)
    storage.make_private()
    sweeps = _list_sweeps(config, storage, world, process)
    # Of a full disk before the first write, of a bucket when it was found to be there.
    swept = sweep_all(sweeps) if storage.is_local else None
    probe = name_probe_of_rank(world.rank)
    storage.write_bytes(probe, b"")  # fails here, not after hours, where the root is read-only
    storage.delete(probe)
    configure_logging(world, open_log_file(storage, f"{process}-rank-{world.rank:05d}"))
    (swept or sweep_all(sweeps)).log()
    if process == _RUN:
        set_aside_damaged_records(storage)
    configure_torch(config.num_threads, is_deterministic=config.is_deterministic)
    device = device or select_device(config.device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread's own: under a watchdog training has one
    return RunContext(
        config=config,
        storage=storage,
        world=world,
        device=device,
        observer=observer or LocalObserver(),
    )


def _list_sweeps(
    config: RunConfig, storage: Storage, world: World, process: str
) -> list[Callable[[], Swept]]:
    """List what removes the leftovers of killed processes; none but for a node's first process.

    Each node looks for itself: only of its own processes it is known that they are gone.
    """
    if not (world.is_main or world.local_rank == 0):
        return []
    # A group of train workers may start often, and writes in its stage's folder; whoever started it
    # has looked at all of the root.
    folder = "" if process == _RUN else process
    sweeps = [partial(sweep_root, storage, folder), sweep_scratch]
    if config.data.cache is not None:
        sweeps.append(CacheFolder.of(config.data.cache).sweep)
    return sweeps


def check_static_inputs(stage: Stage) -> None:
    """Compare a stage's settings with its record, before any work starts.

    Raises:
        DataError: it was made from others, or is to be taken from a run that has not finished it.
    """
    if stage.name in stage.context.config.upstream:
        _check_taken(stage)
    elif stage.records == "one":
        _find_record(stage, flatten({"settings": stage.settings()}))


def is_stage_done(stage: Stage) -> bool:
    """Whether a stage was finished from the inputs of now.

    Raises:
        DataError: an earlier stage has not finished, or this one was made from other inputs.
    """
    if stage.name in stage.context.config.upstream:
        return True  # `check_static_inputs` has looked
    record = _find_record(stage, stage.collect_inputs())
    return record is not None and record.is_done


def run_stage(stage: Stage, run_chunks: RunChunks) -> None:
    """Run a stage unless it is done, and write its record last.

    Raises:
        DataError: an earlier stage has not finished, or this one was made from other inputs.
    """
    world = stage.context.world
    inputs = stage.collect_inputs()
    record = _find_record(stage, inputs)
    # The main rank changes the record below: all must have read the same one before.
    wait_for_ranks(world)
    if record is not None and record.is_done:
        logger.info("%s: already done from the same inputs, skipped", stage.name)
        return
    logger.info("%s: %s", stage.name, "continues" if record else "starts")
    history = record.history if record else {}
    if (record is None or record.inputs != inputs) and world.is_main:
        stage.save_record(
            StageRecord(stage=stage.name, state="started", inputs=inputs, history=history)
        )
    start = time.perf_counter()
    outcome = stage.run(run_chunks)
    seconds = time.perf_counter() - start
    if world.is_main:
        assert outcome.output is not None, "the main rank's outcome has an output"
        stage.save_record(
            StageRecord(
                stage=stage.name,
                state="done",
                inputs=inputs,
                outputs=outcome.output.model_dump(mode="json"),
                metrics=dict(outcome.metrics),
                seconds=seconds,
                history=history,
            )
        )
    # Nobody reports success, or goes on to a stage that reads the record, before it is there.
    wait_for_ranks(world)
    logger.info("%s: done in %.0f s%s", stage.name, seconds, _describe_metrics(outcome.metrics))
    publish_log()  # a cluster may kill this process as soon as its work is over


def _describe_metrics(metrics: Mapping[str, Any]) -> str:
    numbers = [
        f"{name.partition('/')[2]} {format_number(value)}"
        for name, value in metrics.items()
        if isinstance(value, int | float)
    ]
    return f": {', '.join(numbers)}" if numbers else ""


def wait_for_ranks(world: World) -> None:
    if world.world_size > 1:
        dist.barrier()


def write_run_files(context: RunContext) -> None:
    storage = context.storage
    config = dump_config(context.config).encode()
    environment = json.dumps(collect_environment(), indent=1, sort_keys=True).encode()
    write_derived(storage, "config.yaml", lambda: config)
    write_derived(storage, "environment.json", lambda: environment)


def write_summary(context: RunContext) -> None:
    def build() -> bytes:
        return json.dumps(load_summary(context), indent=1).encode()

    write_derived(context.storage, "summary.json", build)


def _find_record(stage: Stage, inputs: Mapping[str, Any]) -> StageRecord | None:
    """Read a stage's record and compare inputs with it, as its kind of record asks.

    A stage that was started but has written nothing binds nobody: who mistyped a path corrects it
    and goes on.
    """
    record = stage.load_record()
    if record is None or (not record.is_done and not stage.has_output()):
        return None
    match stage.records:
        case "one":
            source = stage.context.storage.uri(record_path(stage.name))
            return check_inputs(record, inputs, source=source, growing=stage.growing)
        case "one_per_inputs":
            return record
        case "newest":
            return record if has_inputs(record, inputs) else None


def _check_taken(stage: Stage) -> None:
    """Check that another run has what this one takes, made from this one's settings."""
    storage = stage.context.storage_of(stage.name)
    record = stage.load_record()
    if record is None or not record.is_done:
        raise DataError(
            f"upstream.{stage.name}: {storage.root}: stage {stage.name!r} has not finished there; "
            f"expected a run that has; finish it, or name another"
        )
    source = f"upstream.{stage.name}: {storage.uri(record_path(stage.name))}"
    settings = flatten({"settings": stage.settings()})
    check_inputs(record, settings, source=source)
