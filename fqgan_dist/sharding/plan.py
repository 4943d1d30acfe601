"""Which image of a source goes where in a dataset, decided from names alone.

The order is by a hash of (seed, name): a global permutation that is the same on every machine and
for every version of NumPy, and in which every shard is a mixture of the classes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field, model_validator

from fqgan_dist.errors import DataError
from fqgan_dist.randomness import derive_seed
from fqgan_dist.sharding.listing import SourceListing, class_of
from fqgan_dist.sharding.shard_building import ImagePolicy, PlannedSample

_SHOWN_NAMES = 5
_LAYOUT = 2
"""To be raised when the bytes that are written for the same plan change."""
# A tar header holds names of 100 bytes; a repeated key gets a hash, and all get an extension.
_MAX_STEM_LENGTH = 72
_HASH_LENGTH = 12


class ShardingConfig(ImagePolicy):
    """What dataset to make from a source."""

    name: str = Field(min_length=1)
    """Name of the dataset, for people."""
    split: str = Field(min_length=1)
    """Part of the dataset: `train`, `val` ..."""
    samples_per_shard: int = Field(default=1000, ge=1)
    """Greatest number of images in a shard; a shard is held in memory while it is made."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the images."""
    allow_lossy_evaluation: bool = False
    """Let images of another split than `train` be re-encoded: scores against them (rFID) are then
    not comparable, and every result says so."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> ShardingConfig:
        lossy_evaluation = self.split != "train" and self.short_side is not None
        if lossy_evaluation and not self.allow_lossy_evaluation:
            raise ValueError(
                f"short_side: {self.short_side} re-encodes the images of split {self.split!r}, the "
                "reference of rFID; leave short_side out, or set allow_lossy_evaluation=true"
            )
        if self.allow_lossy_evaluation and not lossy_evaluation:
            raise ValueError(
                "allow_lossy_evaluation: has an effect only with short_side and a split other than "
                "'train'; leave it out"
            )
        return self

    def describe_policy(self) -> dict[str, Any]:
        """Give what the index tells about the images and their order."""
        policy = self.describe_images() | {"order_seed": self.seed}
        return policy | ({"lossy_evaluation": True} if self.allow_lossy_evaluation else {})


@dataclass(frozen=True)
class PlannedShard:
    """One shard before its images are read."""

    file: str
    """Name of the tar file."""
    samples: list[PlannedSample]
    """Its samples, in order."""
    plan_sha256: str
    """Hash of all that decides the shard's bytes, but for the images themselves."""


@dataclass(frozen=True)
class DatasetPlan:
    """All shards before any image is read."""

    classes: list[str]
    """Class names; a label is the position."""
    class_descriptions: dict[str, str]
    """Readable names of classes."""
    shards: list[PlannedShard]
    """The shards, in order."""
    plan_sha256: str
    """Hash of all that decides the dataset, but for the images themselves."""

    @property
    def num_samples(self) -> int:
        """Number of images, those that will not decode included."""
        return sum(len(shard.samples) for shard in self.shards)


def plan_dataset(
    source: SourceListing,
    config: ShardingConfig,
    *,
    classes: Sequence[str] | None = None,
    class_descriptions: Mapping[str, str] | None = None,
) -> DatasetPlan:
    """Assign every image of a source to a shard, and give it key and label.

    Args:
        source: the images.
        config: what to make.
        classes: class names in the order of their labels; None: those of the source, sorted.
        class_descriptions: readable names of classes; None: there are none.

    Raises:
        DataError: an image has a class that is not in `classes`.
    """
    found = source.class_names()
    class_list = found if classes is None else list(classes)
    if unknown := sorted(set(found) - set(class_list)):
        raise DataError(
            f"{source.uri}: {len(unknown)} classes are not in the given list of "
            f"{len(class_list)}: {unknown[:_SHOWN_NAMES]!r}; correct the list, or the source"
        )
    header = {
        "layout": _LAYOUT,
        "policy": config.describe_policy(),
        "name": config.name,
        "split": config.split,
        "classes": class_list,
        "class_descriptions": dict(class_descriptions or {}),
        "problems": [problem.model_dump() for problem in source.problems],
    }
    header_sha256 = _hash_json(header)
    labels = {name: label for label, name in enumerate(class_list)}
    keys = make_keys(source.names)
    rows = _permute(source.names, config.seed)
    shards = [
        _plan_shard(source, number, rows[start:stop], keys, labels, header_sha256)
        for number, (start, stop) in enumerate(_split_evenly(len(rows), config.samples_per_shard))
    ]
    plan_sha256 = _hash_json([header_sha256, *(shard.plan_sha256 for shard in shards)])
    return DatasetPlan(class_list, header["class_descriptions"], shards, plan_sha256)


def make_keys(names: Sequence[str]) -> list[str]:
    """Make a safe, unique and readable key of each `class/name.ext`.

    ImageNet's `n01440764/n01440764_18.JPEG` gives `n01440764_18`; elsewhere the class is put before
    the name. What is not a letter, digit, `_` or `-` becomes `-`; keys that several names would
    share get a hash of the name.
    """
    stems = [_make_stem(name) for name in names]
    counts = Counter(stems)
    keys = [
        stem if counts[stem] == 1 else f"{stem}-{_hash_text(name)[:_HASH_LENGTH]}"
        for stem, name in zip(stems, names, strict=True)
    ]
    assert len(set(keys)) == len(keys), "two names gave one key"
    return keys


def _make_stem(name: str) -> str:
    class_name, _, file_name = name.partition("/")
    stem = file_name.rpartition(".")[0]
    text = stem if stem.startswith(class_name) else f"{class_name}_{stem}"
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", text).lstrip("-_")
    return safe[:_MAX_STEM_LENGTH] or "sample"


def _permute(names: Sequence[str], seed: int) -> list[int]:
    return sorted(
        range(len(names)), key=lambda row: (derive_seed(seed, "sample_order", names[row]), row)
    )


def _split_evenly(count: int, greatest: int) -> list[tuple[int, int]]:
    """Cut `count` into the fewest parts of at most `greatest`, equal to one."""
    parts = -(-count // greatest)
    bounds = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def _plan_shard(
    source: SourceListing,
    number: int,
    rows: Sequence[int],
    keys: Sequence[str],
    labels: Mapping[str, int],
    header_sha256: str,
) -> PlannedShard:
    samples = [
        PlannedSample(row, keys[row], source.names[row], labels[class_of(source.names[row])])
        for row in rows
    ]
    lines = [
        [sample.key, sample.label, sample.name, int(source.sizes[sample.row])] for sample in samples
    ]
    return PlannedShard(f"shard-{number:06d}.tar", samples, _hash_json([header_sha256, lines]))


def _hash_json(value: Any) -> str:
    return _hash_text(json.dumps(value, sort_keys=True))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
