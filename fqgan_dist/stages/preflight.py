"""What can be known to be wrong before any work starts, all of it at once.

The config's own validators see one section at a time and no files; here sections are compared with
the networks that they name, and the files that pending stages will read are looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.data.records import check_codebook_size
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.sources.locations import source_exists
from fqgan_dist.stages.adm_reference import describe_missing
from fqgan_dist.stages.codes import count_code_views
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import needed_weights
from fqgan_dist.stages.manifest import load_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.placement import (
    find_device_conflicts,
    planned_world_size,
    training_stages,
)
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.training.micro_batches import assign_slots
from fqgan_dist.weights.staging import describe_missing_file
from fqgan_dist.world import World


def check_settings(config: RunConfig, *, world_size: int | None = None) -> None:
    """Check what needs no file.

    Args:
        config: the run.
        world_size: ranks that train; None takes what `fqgan run` would start.

    Raises:
        ConfigError: every problem, one line each.
    """
    problems = [*_find_rank_problems(config, world_size or planned_world_size(config))]
    problems += find_device_conflicts(config)
    for check in (
        lambda: check_codebook_size(config.tokenizer.model.codebook_size),
        lambda: count_code_views(config.codes.views),
    ):
        try:
            check()
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
    pending = {stage for stage in context.config.stages if not _is_done(context, stage)}
    _raise([problem for stages, problem in find_missing_files(context.config) if stages & pending])


def _find_rank_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    for stage in training_stages(config):
        training = getattr(config, stage).training
        try:
            assign_slots(
                training.micro_batches_per_step,
                World(world_size=world_size),
                training.ranks_per_micro_batch,
            )
        except ConfigError as error:
            yield f"{stage}.{error}"


def find_missing_files(config: RunConfig) -> Iterator[tuple[frozenset[StageName], str]]:
    """Look for local files that the config names; objects in buckets are left to their readers.

    Yields:
        The stages that read a missing file, and a message that names the setting.
    """
    for field in ("source", "validation_source"):
        source = getattr(config.data, field)
        if source in (None, BUILTIN_PHOTOGRAPHS) or "://" in source:
            continue
        if not source_exists(source):
            yield (
                frozenset({"shards"}),
                f"data.{field}: {source!r}: no such file or folder; expected a folder of class "
                f"folders, a tar, zip, shards, parquet, a manifest or {BUILTIN_PHOTOGRAPHS}",
            )
    for needed in needed_weights(config):
        source = needed.weights.source
        if needed.weights.is_file and _is_missing(source):
            yield needed.readers, describe_missing_file(needed.field, source)
    reference = config.evaluation.adm_reference
    if reference is not None and _is_missing(reference):
        yield frozenset({"evaluation"}), describe_missing(reference)


def _is_missing(source: str) -> bool:
    return "://" not in source and not Path(source).exists()


def _is_done(context: RunContext, stage: StageName) -> bool:
    record = load_record(context.storage, stage)
    return record is not None and record.state == "done"


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join(problems))
