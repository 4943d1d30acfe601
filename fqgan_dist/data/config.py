"""Settings of the images: where they come from, how they are viewed, read and kept."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fqgan_dist.config import Config
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.storage.uri import LocalPath, Location, parse_location

BUILTIN_PHOTOGRAPHS = "builtin:photographs"
"""The source that needs no files: crops of a dozen photographs that scikit-image carries."""
DEFAULT_SAMPLES_PER_SHARD = 1000
ViewPolicy = Literal["random_crop_flip", "ten_crop", "center"]
ViewMode = Literal["reference", "fast"]


USUAL_VIEW_SHORT_SIDE = 320
"""Short side to which the paper's random crops of 256 pixels resize an image at most."""


class ViewConfig(Config):
    """How images are cropped."""

    policy: ViewPolicy
    """`random_crop_flip`: a random scale, place and mirroring per view. `ten_crop`: views 0-4 are
    the corners (top left, top right, bottom left, bottom right) and the centre of a larger centre
    crop, 5-9 the same of its mirror image. `center`: the one centre crop."""
    image_size: int = Field(ge=1)
    """Side of the crop in pixels; in a run's config it follows from the tokenizer."""
    max_resize_ratio: float = Field(default=1.25, ge=1)
    """random_crop_flip: the short side is uniform in image_size x [1, max_resize_ratio]."""
    crop_ratio: float = Field(default=1.1, ge=1)
    """ten_crop: side of the centre crop that the ten are taken from, over image_size."""
    mode: ViewMode = "reference"
    """`reference`: the pixels of the paper's augmentation, exactly. `fast`: the same crops, at 2 to
    4 times the speed; the values differ by 0.1 of 255 on average, by 1 to 2 where the reference
    halves an image (`fast_views` has the distribution). Features and codes are of one mode."""

    def find_problems(self) -> Iterator[str]:
        """Find settings that the policy has no use for."""
        users = {"max_resize_ratio": "random_crop_flip", "crop_ratio": "ten_crop"}
        for name, policy in users.items():
            default = type(self).model_fields[name].default
            if self.policy != policy and getattr(self, name) != default:
                yield (
                    f"{name}: {getattr(self, name)!r} has no effect with policy {self.policy!r}; "
                    f"leave it out, or choose policy {policy!r}"
                )

    @property
    def greatest_short_side(self) -> int:
        """Short side that images are resized to at most, in pixels."""
        match self.policy:
            case "random_crop_flip":
                # The reference takes the ceiling; the small number undoes rounding such as
                # 1.1 x 20 > 22.
                return math.ceil(self.image_size * self.max_resize_ratio - 1e-9)
            case "ten_crop":
                return self.ten_crop_side
            case "center":
                return self.image_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of a view."""
        return 3, self.image_size, self.image_size

    @property
    def ten_crop_side(self) -> int:
        """Side of the centre crop that ten crops are taken from, in pixels."""
        return int(self.image_size * self.crop_ratio)


class ShardCacheConfig(Config):
    """A cache of shards on a disk of the machine, shared by its processes and by several jobs."""

    folder: LocalPath | None = None
    """Folder on a local disk; None: `fqgan_dist/shards` in the user's cache folder
    (`XDG_CACHE_HOME`, else `~/.cache`)."""
    max_gib: float = Field(default=200.0, gt=0)
    """What all shards in the folder may take together, those of other jobs included."""
    min_free_gib: float = Field(default=10.0, ge=0)
    """What is left free on the folder's disk."""

    def find_folder(self) -> Path:
        """Return the folder, absolute.

        Raises:
            ConfigError: it is not given and the user has no home.
        """
        if self.folder is not None:
            return self.folder.absolute()
        try:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError as error:
            raise ConfigError(
                "data.cache.folder: None, but the user has no home folder; name a folder"
            ) from error
        return Path(base).absolute() / "fqgan_dist" / "shards"


def parse_source(source: str) -> str:
    """Return a source of images as `parse_location` does; the built-in one is a name.

    Raises:
        ValueError: see `parse_location`.
    """
    return source if source == BUILTIN_PHOTOGRAPHS else parse_location(source)


Source = Annotated[str, AfterValidator(parse_source)]
"""A setting that names images."""


class DataConfig(Config):
    """Training and validation images."""

    source: Source
    """Image folder, tar(.gz), zip, WebDataset shards (a folder, or `x-{000..146}.tar`), parquet, or
    a CSV/JSONL list of files; a path or s3://. Or `builtin:photographs`."""
    source_options: SourceOptions = SourceOptions()
    """How `source` is read, and what is found beside it."""
    validation_source: Location | None = None
    """Held-out images; None: `val`, `valid`, `validation` or `test` beside `source` if it is called
    `train`, or those files of its folder that are called so; else a share of it."""
    validation_options: SourceOptions = SourceOptions()
    """How `validation_source` is read. Images without classes (`class_key: none`) are enough to
    evaluate a tokenizer, but not to train a generator."""
    classes: Location | None = None
    """File of class names, one per line in the order of their labels, perhaps with a tab (behind a
    WordNet id, a space) and a readable name; None: the training images' classes."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of `source` that is held out where it has no validation images beside it."""
    seed: int = 0
    """Key of the shards' permutation, the held-out share, the sample order and the views."""
    name: str = Field(default="images", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Folder of the shards under the storage root's `data/`."""
    samples_per_shard: int = Field(default=DEFAULT_SAMPLES_PER_SHARD, gt=0)
    """Images per tar file."""
    short_side: int | None = Field(default=None, gt=0)
    """Resize training images so that the short side has this many pixels; None keeps the bytes."""
    crops_per_photograph: int = Field(default=128, gt=0)
    """With `builtin:photographs`: training crops of each."""
    views: ViewConfig
    """How training images are augmented."""
    num_views: int | None = Field(default=None, gt=0)
    """Distinct views per image; epoch e uses view e mod num_views. None: a new view every epoch."""
    window_shards: int = Field(default=8, gt=0)
    """Shards whose samples are shuffled together."""
    loader_workers: int = Field(default=0, ge=0)
    """Decoding processes per train worker; 0 decodes in a thread."""
    on_damage: Literal["replace", "fail"] = "replace"
    """What an image with wrong bytes, or that cannot be decoded, does. `replace`: another image,
    fixed by data.seed and its place in the order, is trained on instead; features and codes are
    stored without it, and evaluation leaves it out. A warning and the stage's damaged_samples.jsonl
    say so. `fail`: the stage stops."""
    max_damaged_in_a_row: int = Field(default=5, ge=2)
    """With `replace`: as many damaged images one after another, those included that would stand in
    for the first, fail."""
    cache: ShardCacheConfig | None = None
    """Local disk where training shards are kept; None reads every image from the storage. It only
    pays where the storage is remote."""

    @property
    def damage_limit(self) -> int:
        """Damaged images in a row that are an error."""
        return 1 if self.on_damage == "fail" else self.max_damaged_in_a_row

    def find_problems(self) -> Iterator[str]:
        """Find settings that have no effect beside others."""
        fields = type(self).model_fields
        if (
            self.on_damage == "fail"
            and self.max_damaged_in_a_row != fields["max_damaged_in_a_row"].default
        ):
            yield (
                f"max_damaged_in_a_row: {self.max_damaged_in_a_row} has no effect with on_damage: "
                "'fail'; remove one of them"
            )
        if self.validation_source is None:
            if self.validation_options != fields["validation_options"].default:
                yield (
                    "validation_options: have no effect without validation_source, as what is "
                    "found beside source is read by source_options; name the validation images"
                )
            return
        if self.source == BUILTIN_PHOTOGRAPHS:
            yield (
                f"validation_source: {self.validation_source!r} has no effect with source: "
                f"{self.source!r}, which brings its own; remove it"
            )
        elif self.validation_fraction != fields["validation_fraction"].default:
            yield (
                f"validation_fraction: {self.validation_fraction} has no effect with "
                f"validation_source: {self.validation_source!r}; remove one of them"
            )
