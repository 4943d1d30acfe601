"""Run one training stage without Ray, in one process or under torchrun.

    python -m fqgan_dist.training.run CONFIG stage=tokenizer|autoregressive [key.sub=value ...]
    torchrun --nproc-per-node 8 -m fqgan_dist.training.run CONFIG stage=tokenizer

The stages before it must have finished (`fqgan run CONFIG "stages=[shards, teachers]"`). What is
written is what `fqgan run` writes, so either continues the other's run. Exit codes: 0 done, 1
failed, 2 wrong usage or config.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fqgan_dist.chunks import ChunkWork
from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError, FqganError
from fqgan_dist.loss_group import RANK_TIMEOUT
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.run import (
    check_static_inputs,
    open_run,
    run_stage,
    write_run_files,
    write_summary,
)
from fqgan_dist.stages.stage import find_stage, select_device
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver, Observer
from fqgan_dist.world import World

logger = logging.getLogger(__name__)

DONE, FAILED, WRONG_USAGE = 0, 1, 2

USAGE = "expected CONFIG stage=tokenizer|autoregressive [key.sub=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World.from_environment()
    configure_logging(world, None)
    try:
        config, stage_name = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        run_training_stage(config, stage_name, world)
    except ConfigError as error:
        logger.error("ConfigError: %s", error)
        return WRONG_USAGE
    except FqganError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return FAILED
    return DONE


def parse_arguments(arguments: Sequence[str]) -> tuple[RunConfig, str]:
    """Read the command line into a config and the name of a stage.

    Raises:
        ConfigError: the config file or the stage is not named, or the config is wrong.
    """
    stages = [text.removeprefix("stage=") for text in arguments if text.startswith("stage=")]
    rest = [text for text in arguments if not text.startswith("stage=")]
    if not rest or "=" in rest[0]:
        raise ConfigError(f"arguments {list(arguments)!r} name no config file; {USAGE}")
    if len(stages) != 1 or stages[0] not in ("tokenizer", "autoregressive"):
        raise ConfigError(f"stage: {stages!r}: exactly one must be named; {USAGE}")
    config = load_config(rest[0], rest[1:], RunConfig)
    return config.model_copy(update={"stages": (stages[0],)}), stages[0]


def run_training_stage(config: RunConfig, stage_name: str, world: World) -> None:
    """Train one stage of a run to the end, as one rank of a world.

    Raises:
        FqganError: an earlier stage has not finished, or the training failed.
    """
    with process_group(config, world):
        train_stage(config, stage_name, world, observer=LocalObserver())


def train_stage(config: RunConfig, stage_name: str, world: World, *, observer: Observer) -> None:
    """Train one stage to the end, as one rank; several have joined their process group before.

    Raises:
        FqganError: an earlier stage has not finished, or the training failed.
    """
    context = open_run(config, world, process=stage_name, observer=observer)
    check_run(context)
    stage = find_stage(stage_name)(context)
    check_static_inputs(stage)
    if world.is_main:
        write_run_files(context)
    run_stage(stage, _refuse_chunks)
    if world.is_main:
        write_summary(context)


@contextmanager
def process_group(config: RunConfig, world: World) -> Iterator[None]:
    """Join the other ranks for a block: NCCL between GPUs, gloo between CPUs.

    One process needs no group, unless DeepSpeed trains it. Where a block of several ranks fails,
    its group stays until the process ends.
    """
    trainings = (config.tokenizer.training, config.autoregressive.training)
    if world.world_size == 1 and all(training.engine == "plain" for training in trainings):
        yield
        return
    device = select_device(config.device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] the documented name
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=RANK_TIMEOUT)
    try:
        yield
    except BaseException:
        # NCCL destroys a group with all of its ranks. After an error the others wait in another
        # collective: this one would wait for them, instead of ending and so ending them.
        if world.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _refuse_chunks(work: ChunkWork) -> None:
    raise AssertionError(f"a training stage has no chunks, but asked for {work.description!r}")


if __name__ == "__main__":
    sys.exit(main())
