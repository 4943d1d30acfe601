"""`fqgan-data shard`: make a dataset from images of any kind of source."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from data_tools.workers import WorkerOptions, open_workers
from fqgan_dist.config import Config
from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.data.index import DatasetIndex, SourceProblem
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.building import ShardingReport, build_dataset
from fqgan_dist.sharding.class_files import read_classes
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.plan import ShardingConfig, plan_dataset
from fqgan_dist.sharding.plan_files import check_settings
from fqgan_dist.sharding.problems import NUM_INDEXED_PROBLEMS
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.uri import Location
from fqgan_dist.telemetry.observer import Observer

PartT = TypeVar("PartT", bound=Config)

_PHOTOGRAPH_OPTIONS = ("image_size", "crops_per_photograph")


class ShardOptions(WorkerOptions, SourceOptions, ShardingConfig, PhotographsConfig):
    """Options of `fqgan-data shard`.

    `image_size` and `crops_per_photograph` are for builtin:photographs only, and `seed` also places
    its crops.
    """

    classes: Location | None = None
    """File of class names, one per line in the order of their labels, perhaps with a tab (behind a
    WordNet id, a space) and a readable name; none: the source's classes."""


@dataclass(frozen=True, kw_only=True)
class WorkSummary:
    """What a command that makes shards did."""

    num_built: int = 0
    """Shards that this run wrote."""
    num_kept: int = 0
    """Shards of the same job that an earlier run had written."""
    num_images: int = 0
    """Images that this run read and checked."""
    bytes_read: int = 0
    """Bytes of these images in the source."""
    bytes_written: int = 0
    """Bytes of the tars that this run wrote."""
    seconds: float = 0.0
    """Time that it took, without the listing of the source."""
    images_per_s: float = 0.0
    """Images per second of that time."""
    num_problems: int = 0
    """Members of the source that are not in the dataset."""
    problem_tables: Sequence[str] = ()
    """Files of the dataset that name all of them, one JSON object per line."""
    problems: Sequence[dict[str, Any]] = ()
    """The first of them: name, reason, action."""

    @classmethod
    def of(cls, index: DatasetIndex, report: ShardingReport, started: float) -> WorkSummary:
        """Sum up a job.

        Args:
            index: the dataset.
            report: what was done.
            started: `time.monotonic()` of the beginning.
        """
        seconds = time.monotonic() - started
        return cls(
            num_built=report.num_built,
            num_kept=report.num_kept,
            num_images=report.num_images,
            bytes_read=report.bytes_read,
            bytes_written=report.bytes_written,
            seconds=round(seconds, 3),
            images_per_s=round(report.num_images / seconds, 1) if seconds else 0.0,
            num_problems=len(report.problems),
            problem_tables=[table.file for table in index.problem_tables],
            problems=list_problems(report.problems),
        )


@dataclass(frozen=True)
class ShardSummary:
    """What `shard` did, or would do."""

    destination: str
    """Where the dataset is."""
    dataset_id: str | None
    """The sha256 of the index; None in a dry run."""
    was_complete: bool
    """Whether there was nothing to do."""
    num_classes: int
    """Classes."""
    classes: Sequence[str]
    """Their names, in the order of their labels."""
    num_samples: int
    """Images in the dataset; in a dry run those that are named like images."""
    num_shards: int
    """Shards of the dataset."""
    num_bytes: int
    """Bytes of all tars; in a dry run those of the images in the source."""
    work: WorkSummary = field(default_factory=WorkSummary)
    """What this run did."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values, on one level."""
        values = asdict(self)
        return values | values.pop("work")


def shard(
    source_uri: str,
    destination: str,
    options: ShardOptions,
    *,
    is_dry_run: bool,
    observer: Observer,
) -> ShardSummary:
    """Make a dataset, or say what would be made.

    Raises:
        ConfigError: an option has no effect, or the class file is wrong.
        DataError: see `open_source` and `build_dataset`.
        ClusterError: see `open_workers`.
    """
    classes, descriptions = read_classes(options.classes) if options.classes else (None, None)
    folder = Storage(destination)
    source_options = select_options(options, SourceOptions).model_dump(exclude_unset=True)
    config = select_options(options, ShardingConfig)
    check_settings(folder, config)
    with open_source(
        source_uri,
        split=options.split,
        photographs=_select_photographs(source_uri, options),
        observer=observer,
        **source_options,
    ) as source:
        if descriptions is not None:
            used = set(source.class_names() if classes is None else classes)
            descriptions = {name: text for name, text in descriptions.items() if name in used}
        return make_dataset(
            source,
            folder,
            config,
            options,
            source_options=source_options,
            is_dry_run=is_dry_run,
            observer=observer,
            classes=classes,
            class_descriptions=descriptions,
        )


def make_dataset(
    source: SourceListing,
    folder: Storage,
    config: ShardingConfig,
    workers: WorkerOptions,
    *,
    source_options: Mapping[str, Any],
    is_dry_run: bool,
    observer: Observer,
    classes: Sequence[str] | None = None,
    class_descriptions: Mapping[str, str] | None = None,
) -> ShardSummary:
    """Make a dataset of a listing, or say what would be made.

    Raises:
        DataError: see `build_dataset`.
        ClusterError: see `open_workers`.
    """
    started = time.monotonic()
    named = {"classes": classes, "class_descriptions": class_descriptions}
    if is_dry_run:
        return _preview(folder, source, config, **named)
    with open_workers(workers, folder, source, observer) as run_chunks:
        index, report = build_dataset(
            source, folder, config, source_options=source_options, run_chunks=run_chunks, **named
        )
    return ShardSummary(
        destination=folder.root,
        dataset_id=index.dataset_id,
        was_complete=report.was_complete,
        num_classes=index.num_classes,
        classes=index.classes,
        num_samples=index.num_samples,
        num_shards=len(index.shards),
        num_bytes=sum(entry.bytes for entry in index.shards),
        work=WorkSummary.of(index, report, started),
    )


def list_problems(problems: Sequence[SourceProblem]) -> list[dict[str, Any]]:
    """Give the first problems as plain values."""
    return [problem.model_dump() for problem in problems[:NUM_INDEXED_PROBLEMS]]


def select_options(options: Config, part: type[PartT]) -> PartT:
    """Give the options of one part, which are also fields of a command's."""
    # Only what was given: the parts check that no setting is given without effect.
    given = options.model_fields_set & set(part.model_fields)
    return part(**{name: getattr(options, name) for name in given})


def _preview(
    folder: Storage, source: SourceListing, config: ShardingConfig, **named: Any
) -> ShardSummary:
    plan = plan_dataset(source, config, **named)
    return ShardSummary(
        destination=folder.root,
        dataset_id=None,
        was_complete=False,
        num_classes=len(plan.classes),
        classes=plan.classes,
        num_samples=plan.num_samples,
        num_shards=len(plan.shards),
        num_bytes=int(source.sizes.sum()),
        work=WorkSummary(
            num_problems=len(source.problems), problems=list_problems(source.problems)
        ),
    )


def _select_photographs(source_uri: str, options: ShardOptions) -> PhotographsConfig | None:
    if source_uri == BUILTIN_PHOTOGRAPHS:
        return select_options(options, PhotographsConfig)
    for name in _PHOTOGRAPH_OPTIONS:
        if name in options.model_fields_set:
            raise ConfigError(f"{name}: has an effect on {BUILTIN_PHOTOGRAPHS} only; leave it out")
    return None
