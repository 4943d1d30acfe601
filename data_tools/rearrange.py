"""`fqgan-data reshard`, `split` and `merge`: datasets made of the samples of datasets.

The images keep their keys and, unless another size is asked for, their bytes. The new dataset is
planned and built like any other, so an interrupted job continues, and the old datasets stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from data_tools.shard import ShardSummary, make_dataset
from data_tools.workers import WorkerOptions
from fqgan_dist.config import parse_config
from fqgan_dist.data.config import DEFAULT_SAMPLES_PER_SHARD
from fqgan_dist.data.index import DatasetIndex, load_index
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.randomness import derive_seed
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.listing import SourceListing, class_of
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.sources.joining import join_listings
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer

_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_POLICY_FIELDS = tuple(ImagePolicy.model_fields)


class RearrangeOptions(WorkerOptions):
    """Options that `reshard`, `split` and `merge` share."""

    samples_per_shard: int = Field(default=DEFAULT_SAMPLES_PER_SHARD, ge=1)
    """Greatest number of images in a shard; a shard is held in memory while it is made."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the images, and of the choice of a part's images."""
    allow_lossy_evaluation: bool = False
    """Let images of another split than `train` be re-encoded ones; see `fqgan-data shard`."""


class ReshardOptions(RearrangeOptions, ImagePolicy):
    """Options of `fqgan-data reshard`."""

    name: str | None = Field(default=None, min_length=1)
    """Name of the new dataset; none: as before."""
    split: str | None = Field(default=None, min_length=1)
    """Part of the dataset; none: as before."""


class SplitOptions(RearrangeOptions):
    """Options of `fqgan-data split`."""

    parts: dict[str, float] = Field(min_length=2)
    """Names and shares of the parts, as in '{train: 0.9, val: 0.1}'; each becomes a dataset below
    DST, with about its share of every class."""

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, parts: dict[str, float]) -> dict[str, float]:
        wrong = [name for name in parts if _PART_NAME.fullmatch(name) is None]
        if wrong:
            raise ValueError(f"{wrong!r}: expected names of letters, digits, '_' and '-'")
        if min(parts.values()) <= 0 or abs(sum(parts.values()) - 1) > 1e-6:
            raise ValueError(f"shares {list(parts.values())}: expected positive ones of sum 1")
        return parts


class MergeOptions(RearrangeOptions):
    """Options of `fqgan-data merge`."""

    name: str = Field(min_length=1)
    """Name of the new dataset."""
    split: str | None = Field(default=None, min_length=1)
    """Part of the dataset; none: that of all sources, which then agree."""


@dataclass(frozen=True)
class SplitSummary:
    """What `split` did, or would do."""

    parts: dict[str, ShardSummary]
    """The datasets by the names of the parts."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return {name: part.to_json() for name, part in self.parts.items()}


@dataclass(frozen=True)
class _Job:
    options: RearrangeOptions
    is_dry_run: bool
    observer: Observer


def reshard(
    source_uri: str,
    destination: str,
    options: ReshardOptions,
    *,
    is_dry_run: bool,
    observer: Observer,
) -> ShardSummary:
    """Make a dataset with the samples of another one in other shards, perhaps smaller.

    Raises:
        ConfigError: an option is wrong for this dataset.
        DataError: see `open_source` and `build_dataset`.
    """
    index, policy = _load(source_uri)
    given = {name: getattr(options, name) for name in options.model_fields_set}
    asked = ImagePolicy(**{name: given[name] for name in _POLICY_FIELDS if name in given})
    if asked.is_lossy:
        _check_reduction(source_uri, policy, asked)
        policy = asked
    name, split = options.name or index.name, options.split or index.split
    config = _configure(options, policy, name=name, split=split)
    _check_effect(options, [config])
    with _open_dataset(source_uri, observer) as listing:
        job = _Job(options, is_dry_run, observer)
        return _make(job, listing, Storage(destination), config)


def split(
    source_uri: str,
    destination: str,
    options: SplitOptions,
    *,
    is_dry_run: bool,
    observer: Observer,
) -> SplitSummary:
    """Make a dataset of each part of another one, with the same share of every class.

    Raises:
        ConfigError: an option is wrong for this dataset.
        DataError: a part would be empty; see also `open_source` and `build_dataset`.
    """
    index, policy = _load(source_uri)
    configs = {
        part: _configure(options, policy, name=index.name, split=part) for part in options.parts
    }
    _check_effect(options, configs.values())
    job = _Job(options, is_dry_run, observer)
    with _open_dataset(source_uri, observer) as listing:
        rows = choose_parts(listing.names, list(options.parts.values()), options.seed)
        made: dict[str, ShardSummary] = {}
        for part, chosen in zip(options.parts, rows, strict=True):
            if not len(chosen):
                raise DataError(
                    f"{source_uri}: part {part!r} would be empty: {options.parts[part]} of "
                    f"{len(listing)} images; give it a greater share"
                )
        for part, chosen in zip(options.parts, rows, strict=True):
            folder = Storage(destination).child(part)
            made[part] = _make(job, listing.select(chosen), folder, configs[part])
    return SplitSummary(made)


def merge(
    source_uris: Sequence[str],
    destination: str,
    options: MergeOptions,
    *,
    is_dry_run: bool,
    observer: Observer,
) -> ShardSummary:
    """Make one dataset of several; classes are united by name.

    Raises:
        ConfigError: the datasets differ in what they are.
        DataError: two datasets share a key; see also `open_source` and `build_dataset`.
    """
    loaded = [_load(uri) for uri in source_uris]
    policies = [policy for _, policy in loaded]
    for uri, policy in zip(source_uris, policies, strict=True):
        if policy != policies[0]:
            raise ConfigError(
                f"{uri}: its images are {policy.describe_images()}, those of {source_uris[0]} "
                f"{policies[0].describe_images()}; expected images that were made alike: bring "
                "one of them to the other's form with `fqgan-data reshard` first"
            )
    splits = sorted({index.split for index, _ in loaded})
    if options.split is None and len(splits) > 1:
        raise ConfigError(f"split: the sources are {splits!r}; say what the new dataset is")
    split = options.split or splits[0]
    config = _configure(options, policies[0], name=options.name, split=split)
    _check_effect(options, [config])
    with ExitStack() as stack:
        listings = [stack.enter_context(_open_dataset(uri, observer)) for uri in source_uris]
        job = _Job(options, is_dry_run, observer)
        return _make(job, join_listings(listings), Storage(destination), config)


def choose_parts(names: Sequence[str], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Divide images so that every part gets its share of every class, to about one image.

    Args:
        names: `class/name` of each image.
        shares: of the parts; their sum is 1.
        seed: of the choice, which is a pure function of the names.

    Returns:
        The rows of each part, ascending.
    """
    hashes = [derive_seed(seed, "split", name) for name in names]
    order = sorted(range(len(names)), key=lambda row: (class_of(names[row]), hashes[row], row))
    counts = [0] * len(shares)
    parts: list[list[int]] = [[] for _ in shares]
    for position, row in enumerate(order):
        # To the part that lacks most: so every stretch of the order has all parts in proportion.
        lacks = [
            share * (position + 1) - count for share, count in zip(shares, counts, strict=True)
        ]
        part = lacks.index(max(lacks))
        counts[part] += 1
        parts[part].append(row)
    return [np.array(sorted(rows), np.int64) for rows in parts]


def _load(uri: str) -> tuple[DatasetIndex, ImagePolicy]:
    index = load_index(Storage(uri))
    return index, ImagePolicy.parse_description(index.image_policy)


@contextmanager
def _open_dataset(uri: str, observer: Observer) -> Iterator[SourceListing]:
    with open_source(uri, format="webdataset", observer=observer) as listing:
        yield listing


def _check_reduction(uri: str, had: ImagePolicy, asked: ImagePolicy) -> None:
    """Refuse a size that the images, which were reduced before, do not have any more."""
    if had.crop is not None or (had.short_side or np.inf) <= (asked.short_side or asked.crop or 0):
        raise ConfigError(
            f"{uri}: its images are {had.describe_images()} already; expected a smaller size: "
            "leave it out, or shard the original images again"
        )


def _configure(
    options: RearrangeOptions, policy: ImagePolicy, *, name: str, split: str
) -> ShardingConfig:
    """Say how a dataset is made.

    Raises:
        ConfigError: reduced images would be used for evaluation without being allowed to.
    """
    values: dict[str, Any] = {
        "name": name,
        "split": split,
        "samples_per_shard": options.samples_per_shard,
        "seed": options.seed,
    }
    if policy.is_lossy:
        values |= {key: getattr(policy, key) for key in _POLICY_FIELDS}
        if split != "train":
            values["allow_lossy_evaluation"] = options.allow_lossy_evaluation
    return parse_config(values, ShardingConfig, source=f"dataset {name!r}, split {split!r}")


def _check_effect(options: RearrangeOptions, configs: Iterable[ShardingConfig]) -> None:
    if options.allow_lossy_evaluation and not any(c.allow_lossy_evaluation for c in configs):
        raise ConfigError(
            "allow_lossy_evaluation: has an effect only on re-encoded images of a split other than "
            "'train'; leave it out"
        )


def _make(
    job: _Job, listing: SourceListing, folder: Storage, config: ShardingConfig
) -> ShardSummary:
    return make_dataset(
        listing,
        folder,
        config,
        job.options,
        source_options={"format": "webdataset"},
        is_dry_run=job.is_dry_run,
        observer=job.observer,
    )
