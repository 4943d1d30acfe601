"""Training one stage as one rank: what torchrun, `fqgan run` and Ray's train workers all do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from fqgan_dist.chunks import ChunkWork
from fqgan_dist.devices import select_device
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.data_checks import check_sizes
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.run import (
    check_static_inputs,
    open_run,
    run_stage,
    write_run_files,
    write_summary,
)
from fqgan_dist.stages.shards import measure_data
from fqgan_dist.stages.stage import find_stage
from fqgan_dist.stages.training_stage import find_trainings
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.training.process_group import process_group
from fqgan_dist.world import World


def join_ranks(config: RunConfig, world: World) -> AbstractContextManager[None]:
    """Join the other ranks for a block, see `process_group`."""
    trainings = find_trainings(config).values()
    if world.world_size == 1 and all(training.engine == "plain" for training in trainings):
        return nullcontext()
    return process_group(world, select_device(config.device, world))


def train_stage(config: RunConfig, stage_name: str, world: World, *, observer: Observer) -> None:
    """Train one stage to the end, as one rank; several have joined their process group before.

    Raises:
        FqganError: an earlier stage has not finished, or the training failed.
    """
    context = open_run(config, world, process=stage_name, observer=observer)
    check_run(context)
    stage = find_stage(stage_name)(context)
    check_static_inputs(stage)
    check_sizes([type(stage)], config, measure_data(context))
    if world.is_main:
        write_run_files(context)
    run_stage(stage, _refuse_chunks)
    if world.is_main:
        write_summary(context)


def _refuse_chunks(work: ChunkWork) -> None:
    raise AssertionError(f"a training stage has no chunks, but asked for {work.description!r}")
