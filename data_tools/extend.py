"""`fqgan-data extend`: add images to a dataset; the shards that it has stay as they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_tools.shard import WorkSummary, list_problems, select_options
from data_tools.workers import WorkerOptions, open_workers
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.extending import ExtensionConfig, extend_dataset, plan_extension
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer


class ExtendOptions(WorkerOptions, SourceOptions, ExtensionConfig):
    """Options of `fqgan-data extend`; images get the form that the dataset's own have."""


@dataclass(frozen=True)
class ExtendSummary:
    """What `extend` did, or would do."""

    destination: str
    """Where the dataset is."""
    dataset_id: str | None
    """The sha256 of the new index; None in a dry run."""
    former_id: str
    """Id of the dataset before."""
    was_complete: bool
    """Whether the dataset had all images already."""
    num_samples: int
    """Images in the dataset, with the new ones; in a dry run those named like images among them."""
    num_added: int
    """New images."""
    num_present: int
    """Images of the source that the dataset had, by their keys."""
    added_classes: Sequence[str]
    """New classes."""
    num_shards: int
    """Shards of the dataset, with the new ones."""
    work: WorkSummary = field(default_factory=WorkSummary)
    """What this run did."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values, on one level."""
        values = asdict(self)
        return values | values.pop("work")


def extend(
    source_uri: str,
    destination: str,
    options: ExtendOptions,
    *,
    is_dry_run: bool,
    observer: Observer,
) -> ExtendSummary:
    """Add images to a dataset, or say what would be added.

    Raises:
        ConfigError: an option has no effect.
        DataError: see `open_source` and `extend_dataset`.
        ClusterError: see `open_workers`.
    """
    started = time.monotonic()
    folder = Storage(destination)
    source_options = select_options(options, SourceOptions).model_dump(exclude_unset=True)
    config = select_options(options, ExtensionConfig)
    split = Dataset.open(folder).index.split
    with open_source(source_uri, split=split, observer=observer, **source_options) as source:
        if is_dry_run:
            return _preview(folder, source, config)
        with open_workers(options, folder, source, observer) as run_chunks:
            index, report = extend_dataset(
                source, folder, config, source_options=source_options, run_chunks=run_chunks
            )
    return ExtendSummary(
        destination=folder.root,
        dataset_id=index.dataset_id,
        former_id=report.former_id,
        was_complete=report.work.was_complete,
        num_samples=index.num_samples,
        num_added=report.num_added,
        num_present=report.num_present,
        added_classes=list(report.added_classes),
        num_shards=len(index.shards),
        work=WorkSummary.of(index, report.work, started),
    )


def _preview(folder: Storage, source: SourceListing, config: ExtensionConfig) -> ExtendSummary:
    dataset = Dataset.open(folder)
    index = dataset.index
    extension = plan_extension(source, dataset, config)
    num_added = 0 if extension is None else extension.plan.num_samples
    return ExtendSummary(
        destination=folder.root,
        dataset_id=None,
        former_id=dataset.id,
        was_complete=extension is None,
        num_samples=index.num_samples + num_added,
        num_added=num_added,
        num_present=len(source) if extension is None else extension.num_present,
        added_classes=[] if extension is None else extension.added_classes,
        num_shards=len(index.shards) + (0 if extension is None else len(extension.plan.shards)),
        work=WorkSummary(
            num_problems=len(source.problems), problems=list_problems(source.problems)
        ),
    )
