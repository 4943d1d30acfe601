"""Make a dataset: a plan, its shards as parallel tasks, and the index last.

The bytes are a pure function of the source's listing, its images and the policy, whatever processes
make the shards. A kill leaves whole shards and no index, and the same command goes on where it
stopped.

Source: design.md section 3, "Dataset".
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from fqgan_dist.chunks import RunChunks, run_in_processes
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    INDEX_NAME,
    DatasetIndex,
    ProblemTable,
    ShardEntry,
    SourceProblem,
    write_index,
)
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.labels import describe_classes
from fqgan_dist.sharding.listing import SourceListing, class_of, show_name, sort_problems
from fqgan_dist.sharding.plan import DatasetPlan, PlannedShard, ShardingConfig, plan_dataset
from fqgan_dist.sharding.plan_files import (
    BASE_PLAN,
    PlannedRows,
    describe_difference,
    load_plan,
    publish_plan,
)
from fqgan_dist.sharding.problems import (
    NUM_INDEXED_PROBLEMS,
    describe_kinds,
    load_problems,
    write_problems,
)
from fqgan_dist.sharding.tasks import CheckWork, PublishedShard, ShardFolder, ShardWork
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.sweeping import sweep_leftovers, sweep_root

_CONCURRENT_READS = 32
_SHOWN_NAMES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardingReport:
    """What a job did."""

    was_complete: bool
    """Whether the result was there before, so that nothing was done."""
    num_built: int
    """Shards written by this job."""
    num_kept: int
    """Shards of the plan that an earlier job had written."""
    problems: list[SourceProblem]
    """All members of the source that are not in the dataset, sorted by name."""
    num_images: int = 0
    """Images that this job read and checked."""
    bytes_read: int = 0
    """Bytes of these images in the source."""
    bytes_written: int = 0
    """Bytes of the tars that this job wrote."""


@dataclass(frozen=True)
class FinishedPlan:
    """All shards of a plan, published."""

    entries: list[ShardEntry]
    """The shards that hold an image."""
    problem_table: ProblemTable | None
    """All that was left out; None: nothing."""
    report: ShardingReport
    """What was done."""


def build_dataset(
    source: SourceListing,
    folder: Storage,
    config: ShardingConfig,
    *,
    classes: Sequence[str] | None = None,
    class_descriptions: Mapping[str, str] | None = None,
    source_options: Mapping[str, Any] | None = None,
    run_chunks: RunChunks = run_in_processes,
    log_storage: Storage | None = None,
) -> tuple[DatasetIndex, ShardingReport]:
    """Write a dataset, or what an interrupted call left to be written.

    Images that cannot be decoded are left out, and named in the index, a table and the log.

    Args:
        source: the images.
        folder: of the dataset.
        config: what to write.
        classes: class names in the order of their labels; None: those of the source.
        class_descriptions: readable names of classes; None: those of the source.
        source_options: how the source was opened, noted in the plan.
        run_chunks: makes the shards, by default one after the other in this process; it does not
            change the result.
        log_storage: where processes write log files; None: they write none.

    Raises:
        DataError: another dataset or plan is in the way, an image has an unknown class, a member
            of the source became unreadable, or no image can be decoded.
        ClusterError: from `run_chunks`.
    """
    plan = plan_dataset(source, config, classes=classes, class_descriptions=class_descriptions)
    present = _open_present(folder, plan, source, config)
    if present is not None and not find_missing_files(present):
        kept = len(present.index.shards)
        return present.index, ShardingReport(True, 0, kept, load_problems(present))
    logger.info("%s", describe_classes(plan.classes))
    is_new = publish_plan(
        folder, BASE_PLAN, plan, source, config, source_options=source_options or {}
    )
    done = run_plan(
        plan,
        source,
        config,
        folder,
        BASE_PLAN,
        is_new=is_new,
        run_chunks=run_chunks,
        log_storage=log_storage,
    )
    if present is not None:
        check_remade(present, done.entries)
        return present.index, done.report
    index = _make_index(plan, source, config, done)
    # Last: a folder with an index is a whole dataset.
    write_index(folder, index)
    return index, done.report


def run_plan(
    plan: DatasetPlan,
    source: SourceListing,
    config: ShardingConfig,
    folder: Storage,
    stem: str,
    *,
    is_new: bool,
    run_chunks: RunChunks,
    log_storage: Storage | None,
    filled_classes: Collection[str] = (),
) -> FinishedPlan:
    """Make the shards of a published plan that are not there, and check those that are.

    Args:
        plan: the plan.
        source: its images.
        config: what is made.
        folder: of the dataset.
        stem: name of the plan's files without their endings.
        is_new: whether no other job can have worked on it.
        run_chunks: processes work.
        log_storage: where processes write log files; None: they write none.
        filled_classes: classes that the dataset has, and so images of them.

    Raises:
        DataError: as `build_dataset`.
    """
    if not is_new:
        sweep_leftovers(partial(sweep_root, folder))
    shard_folder = ShardFolder(folder)
    found = _load_all(shard_folder, plan.shards)
    kept = [
        shard
        for shard, one in zip(plan.shards, found, strict=True)
        if one and one.entry is not None
    ]
    # Before the first new shard: what the end of the earlier job damaged shows in minutes, not
    # after the hours of all that is left.
    if kept:
        run_chunks(CheckWork(shard_folder, kept, split=config.split, log_storage=log_storage))
    rows = PlannedRows(folder, stem, plan.header_sha256)
    run_chunks(
        ShardWork(
            shard_folder,
            plan.shards,
            rows,
            source.reader,
            config,
            split=config.split,
            is_source_shared=source.is_shared_by_nodes,
            is_joining=not is_new,
            log_storage=log_storage,
        )
    )
    shards = [one for one in _load_all(shard_folder, plan.shards) if one is not None]
    assert len(shards) == len(plan.shards), "work is over when all shards are there"
    problems = _collect_problems(source, shards, filled_classes)
    table = write_problems(folder, stem, problems)
    report = _report(plan, source, found, shards, problems)
    return FinishedPlan([shard.entry for shard in shards if shard.entry], table, report)


def find_missing_files(dataset: Dataset) -> set[str]:
    """List the files that a dataset's index names and that are not there."""
    index = dataset.index
    needed = {name for shard in index.shards for name in (shard.file, shard.samples_file)}
    # One listing, not a request for each of what may be 24,000 files.
    return (needed | {table.file for table in index.problem_tables}) - set(dataset.folder.list())


def check_remade(dataset: Dataset, entries: Sequence[ShardEntry]) -> None:
    """Check shards that were deleted, because they were damaged, and made again.

    Raises:
        DataError: they are not what the index names, or others are still missing.
    """
    uri = dataset.folder.uri(INDEX_NAME)
    known = {entry.file: entry for entry in dataset.index.shards}
    other = [entry.file for entry in entries if known.get(entry.file) != entry]
    if other:
        raise DataError(
            f"{uri}: {other[0]!r} was made again and is not what it was: the source has changed; "
            "make the dataset in another destination"
        )
    if missing := sorted(find_missing_files(dataset)):
        raise DataError(
            f"{uri}: {len(missing)} files that it names are missing, and this job does not make "
            f"them: {missing[:_SHOWN_NAMES]!r}; run the `fqgan-data shard` or `extend` again that "
            "made them"
        )


def _collect_problems(
    source: SourceListing, shards: Sequence[PublishedShard], filled_classes: Collection[str]
) -> list[SourceProblem]:
    """Give all that was left out, and the classes of which nothing is left.

    These keep their labels, as all do: labels are fixed before an image is decoded.
    """
    left_out = [problem for shard in shards for problem in shard.problems]
    num_lost = Counter(class_of(problem.name) for problem in left_out)
    num_listed = Counter(map(class_of, source.names)) if num_lost else Counter[str]()
    emptied = [
        SourceProblem(
            name=show_name(name),
            reason=f"a class of which none of its {count} images can be used",
            action="skipped",
        )
        for name, count in num_lost.items()
        if count >= num_listed[name] > 0 and name not in filled_classes
    ]
    return sort_problems([*source.problems, *left_out, *emptied])


def _make_index(
    plan: DatasetPlan, source: SourceListing, config: ShardingConfig, done: FinishedPlan
) -> DatasetIndex:
    problems = done.report.problems
    if not done.entries:
        raise DataError(
            f"{source.uri}: none of its {len(source)} images can be used: "
            f"{describe_kinds(problems)}"
        )
    return DatasetIndex(
        name=config.name,
        split=config.split,
        classes=plan.classes,
        class_descriptions=plan.class_descriptions,
        image_policy=config.describe_policy(),
        shards=done.entries,
        plans=[plan.plan_sha256],
        problems=problems[:NUM_INDEXED_PROBLEMS],
        problem_tables=[done.problem_table] if done.problem_table else [],
    )


def _load_all(folder: ShardFolder, shards: Sequence[PlannedShard]) -> list[PublishedShard | None]:
    with ThreadPoolExecutor(_CONCURRENT_READS) as threads:
        return list(threads.map(folder.load, shards))


def _report(
    plan: DatasetPlan,
    source: SourceListing,
    found: Sequence[PublishedShard | None],
    shards: Sequence[PublishedShard],
    problems: list[SourceProblem],
) -> ShardingReport:
    num_built = num_images = bytes_read = bytes_written = start = 0
    for planned, before, now in zip(plan.shards, found, shards, strict=True):
        rows = plan.rows[start : start + planned.count]
        start += planned.count
        if before is None:
            num_images += planned.count
            bytes_read += int(source.sizes[rows].sum())
            if now.entry is not None:
                num_built += 1
                bytes_written += now.entry.bytes
    num_shards = sum(shard.entry is not None for shard in shards)
    return ShardingReport(
        was_complete=False,
        num_built=num_built,
        num_kept=num_shards - num_built,
        problems=problems,
        num_images=num_images,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
    )


def _open_present(
    folder: Storage, plan: DatasetPlan, source: SourceListing, config: ShardingConfig
) -> Dataset | None:
    """Open this very dataset, which may have been extended since.

    Raises:
        DataError: another dataset is there.
    """
    if not folder.exists(INDEX_NAME):
        return None
    dataset = Dataset.open(folder)
    if dataset.index.plans[:1] != [plan.plan_sha256]:
        found = load_plan(folder, BASE_PLAN)
        difference = describe_difference(found, source, config) if found else "made otherwise"
        raise DataError(
            f"{folder.uri(INDEX_NAME)}: a dataset of another source or with other settings is "
            f"there ({difference}); choose another destination, or delete it first"
        )
    return dataset
