"""Run one training stage without Ray, in one process or under torchrun.

    python -m fqgan_dist.training.run CONFIG stage=tokenizer|autoregressive [key.sub=value ...]
    torchrun --nproc-per-node 8 -m fqgan_dist.training.run CONFIG stage=tokenizer

The stages before it must have finished (`fqgan run CONFIG "stages=[shards, teachers]"`). What is
written is what `fqgan run` writes, so either continues the other's run. Exit codes: 0 done, 1
failed, 2 wrong usage or config, 75 what was waited for in vain may come yet, or another rank was
given notice; 143 after SIGTERM, and 1 after Ctrl-C: the step is finished and saved first.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial

from fqgan_dist.command_line import DONE, WRONG_USAGE
from fqgan_dist.config import load_config
from fqgan_dist.ec2_notice import Ec2Notice, is_on_ec2
from fqgan_dist.errors import FAILED, ConfigError, FqganError, exit_code_of
from fqgan_dist.notice import watching
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import all_stages
from fqgan_dist.stages.stage_record import set_aside_damaged_records
from fqgan_dist.stages.train import join_ranks, train_stage
from fqgan_dist.stages.training_stage import TrainingStage
from fqgan_dist.storage.disk_errors import explain_if_of_disk
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.sweeping import sweep_leftovers, sweep_root
from fqgan_dist.storage.uri import parse_path
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver
from fqgan_dist.termination import EXIT_CODE, TerminatedError, clean_termination
from fqgan_dist.training.heartbeats import watched_rank
from fqgan_dist.waiting import patient
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


USAGE = "expected CONFIG stage=tokenizer|autoregressive [key.sub=value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on this rank and return its exit code."""
    world = World.from_environment()
    configure_logging(world, None)
    try:
        config, stage_name = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        # Once without patience: a storage that is not found at first is a mistake, not an outage.
        storage = Storage(config.storage.root)
        storage.exists("config.yaml")
        if world.is_main:
            sweep_leftovers(partial(sweep_root, storage))
            set_aside_damaged_records(storage)
        with (
            clean_termination(config.termination.grace_s),
            patient(config.patience),
            join_ranks(config, world),
            watching([Ec2Notice()] if world.local_rank == 0 and is_on_ec2() else []),
            watched_rank(world, config.watchdog),
        ):
            train_stage(config, stage_name, world, observer=LocalObserver())
    except ConfigError as error:
        logger.error("ConfigError: %s", error)
        return WRONG_USAGE
    except (FqganError, OSError) as error:
        explained = explain_if_of_disk(error)
        if not isinstance(explained, FqganError):
            raise
        logger.error("%s: %s", type(explained).__name__, explained)
        return exit_code_of(explained)
    except TerminatedError:
        logger.error("terminated; the same command continues")
        return EXIT_CODE
    except KeyboardInterrupt:
        logger.error("interrupted; the same command continues")
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
    known = [stage.name for stage in all_stages() if issubclass(stage, TrainingStage)]
    if len(stages) != 1 or stages[0] not in known:
        raise ConfigError(f"stage: {stages!r}: exactly one must be named; {USAGE}")
    try:
        path = parse_path(rest[0])
    except ValueError as error:
        raise ConfigError(f"CONFIG: {error}") from error
    config = load_config(path, rest[1:], RunConfig)
    return config.model_copy(update={"stages": (stages[0],)}), stages[0]


if __name__ == "__main__":
    sys.exit(main())
