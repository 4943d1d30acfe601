"""Which image of a source goes where in a dataset, decided from names alone.

The order is by a hash of (seed, name): a global permutation that is the same on every machine and
for every version of NumPy, and in which every shard is a mixture of the classes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.data.config import DEFAULT_SAMPLES_PER_SHARD
from fqgan_dist.data.index import MAX_SHARD_SAMPLES, Sha256, ShardName
from fqgan_dist.errors import DataError
from fqgan_dist.randomness import derive_seed
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.listing import SourceListing, class_of

LAYOUT = 3
"""To be raised when the bytes that are written for the same plan change."""

_SHOWN_NAMES = 5
# A tar header holds names of 100 bytes; a repeated key gets a hash, and all get an extension.
_MAX_STEM_LENGTH = 72
_HASH_LENGTH = 12


class ShardingConfig(ImagePolicy):
    """What dataset to make from a source."""

    name: str = Field(min_length=1)
    """Name of the dataset, for people."""
    split: str = Field(min_length=1)
    """Part of the dataset: `train`, `val` ..."""
    samples_per_shard: int = Field(default=DEFAULT_SAMPLES_PER_SHARD, ge=1)
    """Greatest number of images in a shard; a shard is held in memory while it is made."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the images."""
    allow_lossy_evaluation: bool = False
    """Let images of another split than `train` be re-encoded: scores against them (rFID) are then
    not comparable, and every result says so."""

    def find_problems(self) -> Iterator[str]:
        """Find what `ImagePolicy` finds, and a policy that does not suit the split."""
        yield from super().find_problems()
        lossy_evaluation = self.split != "train" and self.is_lossy
        if lossy_evaluation and not self.allow_lossy_evaluation:
            field, value = next(
                (field, value)
                for field, value in (("short_side", self.short_side), ("crop", self.crop))
                if value is not None
            )
            yield (
                f"{field}: {value} re-encodes the images of split {self.split!r}, the "
                f"reference of rFID; leave {field} out, or set allow_lossy_evaluation=true"
            )
        if self.allow_lossy_evaluation and not lossy_evaluation:
            yield (
                "allow_lossy_evaluation: has an effect only with short_side or crop and a split "
                "other than 'train'; leave it out"
            )

    def describe_policy(self) -> dict[str, Any]:
        """Give what the index tells about the images and their order."""
        policy = self.describe_images() | {"order_seed": self.seed}
        return policy | ({"lossy_evaluation": True} if self.allow_lossy_evaluation else {})


class PlannedShard(Config):
    """One shard before its images are read."""

    file: ShardName
    """Name of the tar file."""
    count: int = Field(ge=1, le=MAX_SHARD_SAMPLES)
    """Images that are to be in it."""
    sha256: Sha256
    """Hash of all that decides the shard's bytes, but for the images themselves."""


@dataclass(frozen=True, eq=False)
class DatasetPlan:
    """All shards before any image is read; columns, as 14 million images have to fit."""

    classes: list[str]
    """Class names; a label is the position."""
    class_descriptions: dict[str, str]
    """Readable names of classes."""
    rows: np.ndarray
    """Rows of the source's listing in the order of the dataset, shard after shard, (n,) int64."""
    keys: list[str]
    """Key of each row of the listing."""
    labels: np.ndarray
    """Label of each row of the listing, int32."""
    shards: list[PlannedShard]
    """The shards, in order."""
    header_sha256: str
    """Hash of all that decides every shard."""
    plan_sha256: str
    """Hash of all that decides the dataset, but for the images themselves."""

    @property
    def num_samples(self) -> int:
        """Number of images, those that will not decode included."""
        return len(self.rows)


def plan_dataset(
    source: SourceListing,
    config: ShardingConfig,
    *,
    classes: Sequence[str] | None = None,
    class_descriptions: Mapping[str, str] | None = None,
) -> DatasetPlan:
    """Assign every image of a source to a shard, and give it key and label.

    Args:
        source: the images; those that bring a key keep it.
        config: what to make.
        classes: class names in the order of their labels; None: the source's.
        class_descriptions: readable names of classes; None: the source's.

    Raises:
        DataError: an image has a class that is not in `classes`.
    """
    found = source.class_names()
    class_list = found if classes is None else list(classes)
    if classes is not None:
        check_classes(source, class_list)
    described = source.class_descriptions if class_descriptions is None else class_descriptions
    header = {
        "layout": LAYOUT,
        "policy": config.describe_policy(),
        "name": config.name,
        "split": config.split,
        "classes": class_list,
        "class_descriptions": {name: described[name] for name in class_list if name in described},
        "problems": [problem.model_dump() for problem in source.problems],
    }
    return assign_rows(
        source,
        np.arange(len(source)),
        config,
        header,
        keys=source.keys or make_keys(source.names),
        name_shard="shard-{:06d}.tar",
    )


def assign_rows(
    source: SourceListing,
    rows: np.ndarray,
    config: ShardingConfig,
    header: Mapping[str, Any],
    *,
    keys: list[str],
    name_shard: str,
) -> DatasetPlan:
    """Put some rows of a listing into an order and cut that into shards.

    Args:
        source: the images.
        rows: which of them.
        config: samples per shard and seed.
        header: all else that decides the shards' bytes, `classes` and `class_descriptions` among
            it; JSON-able.
        keys: key of every row of the listing.
        name_shard: format of the shards' names.
    """
    header_sha256 = hash_json(header)
    numbers = {name: label for label, name in enumerate(header["classes"])}
    # -1: an extension leaves such rows out, as it has their keys already; the callers refuse
    # others.
    labels = np.array([numbers.get(class_of(name), -1) for name in source.names], np.int32)
    order = _permute(source.names, rows, config.seed)
    shards: list[PlannedShard] = []
    for number, (start, stop) in enumerate(_split_evenly(len(order), config.samples_per_shard)):
        lines = [
            (keys[row], int(labels[row]), source.names[row], int(source.sizes[row]))
            for row in order[start:stop].tolist()
        ]
        sha256 = hash_shard(header_sha256, lines)
        shards.append(
            PlannedShard(file=name_shard.format(number), count=stop - start, sha256=sha256)
        )
    plan_sha256 = hash_json([header_sha256, *(shard.sha256 for shard in shards)])
    return DatasetPlan(
        classes=list(header["classes"]),
        class_descriptions=dict(header["class_descriptions"]),
        rows=order,
        keys=keys,
        labels=labels,
        shards=shards,
        header_sha256=header_sha256,
        plan_sha256=plan_sha256,
    )


def check_classes(
    source: SourceListing, classes: Sequence[str], *, of: str = "the given list"
) -> None:
    """Raise a DataError if an image of a source has a class that is not in a class list.

    `of` says what the list is of.
    """
    if unknown := find_unknown_classes(source, classes):
        raise DataError(
            f"{source.uri}: {len(unknown)} of its classes are not among the {len(classes)} of "
            f"{of}: {unknown[:_SHOWN_NAMES]!r}; correct these, or the source, or say with "
            "class_map= which class each of its labels stands for"
        )


def find_unknown_classes(source: SourceListing, classes: Sequence[str]) -> list[str]:
    """List the classes of a source's images that are not in a class list, sorted."""
    return sorted({class_of(name) for name in source.names} - set(classes))


def make_keys(names: Sequence[str]) -> list[str]:
    """Make a safe, unique and readable key of each `class/name.ext`.

    ImageNet's `n01440764/n01440764_18.JPEG` gives `n01440764_18`; elsewhere the class is put before
    the name. What is not a letter, digit, `_` or `-` becomes `-`; keys that several names would
    share get a hash of the name.

    Raises:
        DataError: names were chosen so that their hashes collide.
    """
    stems = make_stems(names)
    shared = _find_repeated(stems)
    while True:
        keys = [
            add_hash(stem, name) if stem in shared else stem
            for stem, name in zip(stems, names, strict=True)
        ]
        repeated = _find_repeated(keys)
        if not repeated:
            return keys
        # A name may be made to look like another one with its hash: then it gets a hash, too.
        if repeated <= shared:
            same = [name for name, key in zip(names, keys, strict=True) if key in repeated]
            raise DataError(
                f"{same[:_SHOWN_NAMES]!r}: different names whose hashes begin alike, which does "
                "not happen by chance; rename or remove them"
            )
        shared |= repeated


def _find_repeated(values: Sequence[str]) -> set[str]:
    return {value for value, count in Counter(values).items() if count > 1}


def make_stems(names: Sequence[str]) -> list[str]:
    """Make the readable part of each key, which several names may share."""
    return [_make_stem(name) for name in names]


def add_hash(stem: str, name: str) -> str:
    """Make a key that several names would share unique."""
    return f"{stem}-{_hash_text(name)[:_HASH_LENGTH]}"


def hash_shard(header_sha256: str, samples: Sequence[tuple[str, int, str, int]]) -> str:
    """Hash what decides a shard's bytes: the plan's header, and key, label, name, size of all."""
    return hash_json([header_sha256, samples])


def hash_json(value: Any) -> str:
    """Hash JSON-able values, as sha256 in hex."""
    return _hash_text(json.dumps(value, sort_keys=True))


def _make_stem(name: str) -> str:
    class_name, _, file_name = name.partition("/")
    stem = file_name.rpartition(".")[0] or file_name
    text = stem if stem.startswith(class_name) else f"{class_name}_{stem}"
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", text).lstrip("-_")
    return safe[:_MAX_STEM_LENGTH] or "sample"


def _permute(names: Sequence[str], rows: np.ndarray, seed: int) -> np.ndarray:
    hashes = (derive_seed(seed, "sample_order", names[row]) for row in map(int, rows))
    # Not NumPy's shuffle: each image's rank is its own hash, so that one image more or less moves
    # no other past another.
    return rows[np.argsort(np.fromiter(hashes, np.int64, len(rows)), kind="stable")]


def _split_evenly(count: int, greatest: int) -> list[tuple[int, int]]:
    """Cut `count` into the fewest parts of at most `greatest`, equal to one."""
    parts = -(-count // greatest)
    bounds = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(bounds))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
