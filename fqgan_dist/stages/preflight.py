"""What can be known to be wrong before any work starts, all of it at once.

The config's own validators see one section at a time and no files; here sections are compared with
the networks that they name, and the files that pending stages will read are looked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import needed_weights
from fqgan_dist.stages.placement import (
    configured_sizes,
    find_device_conflicts,
    training_stages,
)
from fqgan_dist.stages.stage import (
    RunContext,
    Stage,
    all_stages,
    build_stages,
    find_stage,
)
from fqgan_dist.telemetry.optional_sinks import find_sinks
from fqgan_dist.weights.staging import describe_missing_file, is_missing


def check_settings(config: RunConfig, *, world_size: int | None = None) -> None:
    """Check what needs no file; `world_size` None takes what `fqgan run` would start.

    Raises:
        ConfigError: every problem, one line each.
    """
    sizes = configured_sizes(config) if world_size is None else [world_size]
    problems = [
        problem
        for stage in training_stages(config)
        for problem in stage.find_size_problems(config, sizes)
    ]
    problems += find_device_conflicts(config)
    stages = all_stages()
    pools = {stage.pool for stage in stages if stage.runs_in == "pool"}
    problems += [
        f"ray.pools.{name}: has no effect, as there is no such pool; expected one of "
        f"{', '.join(sorted(pools))}"
        for name in config.ray.pools
        if name not in pools
    ]
    problems += [
        f"upstream.{name}: cannot be taken from another run, as it has a record for each set of "
        f"inputs; remove it"
        for name in config.upstream
        if not find_stage(name).can_be_taken
    ]
    # Of all stages: what is not run now was, or will be.
    problems += [problem for stage in stages for problem in stage.find_problems(config)]
    try:
        find_sinks(config.telemetry.sinks)
    except ConfigError as error:
        problems.append(str(error))
    _raise(problems)


def check_run(context: RunContext) -> None:
    """Check settings, and the files that the pending stages of a run will read.

    Raises:
        ConfigError: every problem, one line each.
    """
    launched = context.world.world_size
    check_settings(context.config, world_size=launched if launched > 1 else None)
    missing = [
        problem
        for stage in build_stages(context)
        if stage.name in context.config.stages and not _is_done(stage)
        for problem in find_missing_files(type(stage), context.config)
    ]
    _raise(list(dict.fromkeys(missing)))  # two stages may read one file


def find_missing_files(stage: type[Stage], config: RunConfig) -> Iterator[str]:
    """Look for local files that a stage reads; objects in buckets are left to their readers."""
    yield from stage.find_missing_files(config)
    for needed in needed_weights(config):
        source = needed.weights.source
        if stage.name in needed.readers and needed.weights.is_file and is_missing(source):
            yield describe_missing_file(needed.field, source)


def _is_done(stage: Stage) -> bool:
    record = stage.find_record()
    return record is not None and record.is_done


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join(problems))
