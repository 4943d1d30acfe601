"""Make a dataset: WebDataset tars, their tables of samples, and the index.

The bytes are a pure function of the source's listing, its images and the policy. Shards are
published one by one, create-only, the tar before its table; the index comes last. So a kill leaves
whole shards and no index, and the same command continues where it stopped.

Source: design.md section 3, "Dataset".
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fqgan_dist.data.index import (
    INDEX_NAME,
    DatasetIndex,
    ShardEntry,
    SourceProblem,
    decode_samples,
    encode_samples,
    hash_object,
    join_path,
    load_index,
    table_name,
    write_index,
)
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.sharding.plan import DatasetPlan, PlannedShard, ShardingConfig, plan_dataset
from fqgan_dist.sharding.shard_building import BuiltShard, build_shard
from fqgan_dist.sharding.sources.opening import Progress, ignore_progress

_logger = logging.getLogger(__name__)

# Metadata of a table of samples: what an interrupted job needs to recognise its own shards.
_PLAN, _TAR_SHA256, _PROBLEMS = "plan_sha256", "tar_sha256", "problems"
_LOGGED_PROBLEMS = 20


@dataclass(frozen=True)
class ShardingReport:
    """What a call of `build_dataset` did."""

    was_complete: bool
    """Whether the dataset was finished before, so that nothing was done."""
    num_built: int
    """Shards written by this call."""
    num_kept: int
    """Shards that an earlier call had written."""
    problems: list[SourceProblem]
    """All members of the source that are not in the dataset, sorted by name."""


@dataclass(frozen=True)
class _ShardResult:
    """A published shard; no entry where none of its images could be decoded."""

    entry: ShardEntry | None
    problems: list[SourceProblem]


def build_dataset(
    source: SourceListing,
    storage: Storage,
    prefix: str,
    config: ShardingConfig,
    *,
    classes: Sequence[str] | None = None,
    class_descriptions: Mapping[str, str] | None = None,
    workers: int = 1,
    progress: Progress = ignore_progress,
) -> tuple[DatasetIndex, ShardingReport]:
    """Write a dataset, or what an interrupted call left to be written.

    Images that cannot be decoded are left out, named in the index and in the log.

    Args:
        source: the images.
        storage: where to write.
        prefix: folder of the dataset below the storage's root; "" for the root itself.
        config: what to write.
        classes: class names in the order of their labels; None: those of the source, sorted.
        class_descriptions: readable names of classes; None: there are none.
        workers: threads that read, check and encode images; they do not change the result.
        progress: told about images.

    Raises:
        DataError: another dataset or shard is in the way, an image has an unknown class, a member
            of the source became unreadable, or no image can be decoded.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    plan = plan_dataset(source, config, classes=classes, class_descriptions=class_descriptions)
    finished = _load_finished(storage, prefix, plan)
    if finished is not None:
        return finished, ShardingReport(True, 0, len(finished.shards), finished.problems)
    entries: list[ShardEntry] = []
    problems = list(source.problems)
    num_built = done = 0
    with ThreadPoolExecutor(workers) as executor:
        for shard in plan.shards:
            result = _load_shard(storage, prefix, shard)
            if result is None:
                built = build_shard(shard.samples, source, config, executor)
                result = _publish_shard(storage, prefix, shard, built)
                num_built += result.entry is not None
            if result.entry is not None:
                entries.append(result.entry)
            problems += result.problems
            done += len(shard.samples)
            progress("writing shards", done, plan.num_samples)
    problems.sort(key=lambda problem: (problem.name, problem.reason))
    _log_problems(problems)
    if not entries:
        raise DataError(
            f"{source.uri}: none of its {len(source)} images can be decoded; "
            f"the first: {problems[0].name!r}: {problems[0].reason}"
        )
    index = DatasetIndex(
        name=config.name,
        split=config.split,
        classes=plan.classes,
        class_descriptions=plan.class_descriptions,
        image_policy=config.describe_policy(),
        shards=entries,
        plans=[plan.plan_sha256],
        problems=problems,
    )
    write_index(storage, prefix, index)
    return index, ShardingReport(False, num_built, len(entries) - num_built, problems)


def _load_finished(storage: Storage, prefix: str, plan: DatasetPlan) -> DatasetIndex | None:
    """Load the index if this very dataset is finished and no file of it is missing.

    Raises:
        DataError: another dataset is there.
    """
    if not storage.exists(join_path(prefix, INDEX_NAME)):
        return None
    index = load_index(storage, prefix)
    if index.plans[:1] != [plan.plan_sha256]:
        raise DataError(
            f"{storage.uri(join_path(prefix, INDEX_NAME))}: a dataset of another source or with "
            "other settings is there; choose another destination, or delete it first"
        )
    present = set(storage.list(prefix))
    needed = {name for shard in index.shards for name in (shard.file, shard.samples_file)}
    # A shard that was deleted because it was damaged is made again; `write_index` compares.
    return index if needed <= present else None


def _load_shard(storage: Storage, prefix: str, shard: PlannedShard) -> _ShardResult | None:
    """Give a shard that an earlier call published; None if it has to be made.

    Raises:
        DataError: another job's shard is there, or the shard is damaged.
    """
    path, table_path = _paths(prefix, shard)
    try:
        table_bytes = storage.read_bytes(table_path)
        sha256, size = hash_object(storage, path)
    except FileNotFoundError:
        return None
    table, metadata = decode_samples(table_bytes, source=storage.uri(table_path))
    if metadata.get(_PLAN) != shard.plan_sha256:
        raise DataError(
            f"{storage.uri(table_path)}: a shard of another source or with other settings is "
            "there; choose another destination, or delete it first"
        )
    if metadata.get(_TAR_SHA256) != sha256:
        raise DataError(
            f"{storage.uri(path)}: damaged: its sha256 is {sha256}, expected "
            f"{metadata.get(_TAR_SHA256)}; delete it, and run again to make it anew"
        )
    entry = ShardEntry(
        file=shard.file,
        count=len(table),
        bytes=size,
        sha256=sha256,
        samples_sha256=hashlib.sha256(table_bytes).hexdigest(),
    )
    problems = [SourceProblem(**values) for values in json.loads(metadata[_PROBLEMS])]
    return _ShardResult(entry, problems)


def _publish_shard(
    storage: Storage, prefix: str, shard: PlannedShard, built: BuiltShard
) -> _ShardResult:
    if not len(built.table):
        return _ShardResult(None, built.problems)
    path, table_path = _paths(prefix, shard)
    sha256 = hashlib.sha256(built.tar).hexdigest()
    problems = [problem.model_dump() for problem in built.problems]
    metadata = {_PLAN: shard.plan_sha256, _TAR_SHA256: sha256, _PROBLEMS: json.dumps(problems)}
    table_bytes = encode_samples(built.table, metadata)
    # The table last: it vouches for the tar.
    _create(storage, path, built.tar)
    _create(storage, table_path, table_bytes)
    entry = ShardEntry(
        file=shard.file,
        count=len(built.table),
        bytes=len(built.tar),
        sha256=sha256,
        samples_sha256=hashlib.sha256(table_bytes).hexdigest(),
    )
    return _ShardResult(entry, built.problems)


def _create(storage: Storage, path: str, data: bytes) -> None:
    try:
        storage.create_bytes(path, data)
    except FileExistsError as error:
        raise DataError(
            f"{storage.uri(path)}: another file is there: it is damaged, or of another source or "
            "with other settings; choose another destination, or delete it first"
        ) from error


def _paths(prefix: str, shard: PlannedShard) -> tuple[str, str]:
    return join_path(prefix, shard.file), join_path(prefix, table_name(shard.file))


def _log_problems(problems: Sequence[SourceProblem]) -> None:
    for problem in problems[:_LOGGED_PROBLEMS]:
        _logger.warning("%s: %s: %s", problem.name, problem.action, problem.reason)
    if len(problems) > _LOGGED_PROBLEMS:
        _logger.warning(
            "... and %d more; all are in %s", len(problems) - _LOGGED_PROBLEMS, INDEX_NAME
        )
