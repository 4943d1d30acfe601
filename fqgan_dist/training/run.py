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
from collections.abc import Sequence

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError, FqganError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import all_stages
from fqgan_dist.stages.train import join_ranks, train_stage
from fqgan_dist.stages.training_stage import TrainingStage
from fqgan_dist.storage.uri import parse_path
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.observer import LocalObserver
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
        with join_ranks(config, world):
            train_stage(config, stage_name, world, observer=LocalObserver())
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
