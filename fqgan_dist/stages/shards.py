"""The `shards` stage: training and validation images as WebDataset shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.errors import ConfigError
from fqgan_dist.randomness import numpy_generator
from fqgan_dist.sharding.building import ShardingReport, build_dataset
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.sharding.sources.locations import folder_exists, source_exists
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.splits import HELD_OUT_WORDS, find_held_out_split
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import RunContext, Stage, StageOutcome, StageOutput
from fqgan_dist.storage.names import is_remote

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
# Validation crops per photograph are the training crops' number divided by this.
PHOTOGRAPHS_VAL_SHARE = 4


class DatasetIds(StageOutput):
    """The ids of the datasets of a run."""

    stage = "shards"

    train: str
    val: str


class ShardsStage(Stage):
    """Makes the shards of both splits."""

    output = DatasetIds
    uses_device = False

    def settings(self) -> Mapping[str, Any]:
        data = self.context.config.data
        decisive = {"source", "validation_source", "validation_fraction", "seed", "name"}
        decisive |= {"samples_per_shard", "short_side"}
        settings = data.model_dump(mode="json", include=decisive)
        if data.source == BUILTIN_PHOTOGRAPHS:
            settings["crops_per_photograph"] = data.crops_per_photograph
            settings["image_size"] = data.views.image_size
        return settings

    def upstream(self) -> Mapping[str, Any]:
        return {}

    def has_output(self) -> bool:
        return bool(self.context.storage.list(f"data/{self.context.config.data.name}"))

    @classmethod
    def find_missing_files(cls, config: RunConfig) -> Iterator[str]:
        for field in ("source", "validation_source"):
            source = getattr(config.data, field)
            if source in (None, BUILTIN_PHOTOGRAPHS) or is_remote(source):
                continue
            if not source_exists(source):
                yield (
                    f"data.{field}: {source!r}: no such file or folder; expected a folder of class "
                    f"folders, a tar, zip, shards, parquet, a manifest or {BUILTIN_PHOTOGRAPHS}"
                )

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        # The class list is the training split's.
        ids: dict[str, str] = {}
        metrics: dict[str, Any] = {}
        classes: list[str] | None = None
        for split in SPLITS:
            with _open_split(self.context, split) as source:
                index, report = self._build(source, split, classes, run_chunks)
            classes = index.classes
            ids[split] = index.dataset_id
            metrics[f"{self.name}/{split}_images"] = index.num_samples
            metrics[f"{self.name}/{split}_problems"] = len(report.problems)
        metrics[f"{self.name}/classes"] = len(classes or [])
        return StageOutcome(DatasetIds(**ids), metrics)

    def _build(
        self,
        source: SourceListing,
        split: str,
        classes: list[str] | None,
        run_chunks: RunChunks,
    ) -> tuple[DatasetIndex, ShardingReport]:
        data = self.context.config.data
        config = ShardingConfig(
            name=data.name,
            split=split,
            samples_per_shard=data.samples_per_shard,
            seed=data.seed,
            # Validation keeps its bytes: it is the reference of rFID.
            short_side=data.short_side if split == "train" else None,
        )
        return build_dataset(
            source,
            self.context.storage.child(_split_path(self.context, split)),
            config,
            classes=classes,
            run_chunks=run_chunks,
            log_storage=self.context.storage,
        )


def open_dataset(context: RunContext, split: str) -> Dataset:
    """Open a split of a run's finished dataset.

    Raises:
        DataError: the stage has not finished, or the dataset is another one by now.
    """
    dataset_id = getattr(context.read(DatasetIds), split)
    folder = context.storage_of(DatasetIds.stage).child(_split_path(context, split))
    return Dataset.open(folder, expected_id=dataset_id)


def _split_path(context: RunContext, split: str) -> str:
    """Name the folder of a split's shards, below the root of a run."""
    return f"data/{context.config.data.name}/{split}"


@contextmanager
def _open_split(context: RunContext, split: str) -> Iterator[SourceListing]:
    """Open the images of a split: their own source, or a share of the only one."""
    data = context.config.data
    if data.source == BUILTIN_PHOTOGRAPHS:
        crops = data.crops_per_photograph
        photographs = PhotographsConfig(
            image_size=data.views.image_size,
            crops_per_photograph=(
                crops if split == "train" else max(1, crops // PHOTOGRAPHS_VAL_SHARE)
            ),
            seed=data.seed,
        )
        with open_source(data.source, split=split, photographs=photographs) as source:
            yield source
        return
    train, val = _locate_splits(data.source, data.validation_source)
    own = find_held_out_split(train) if val is None else None
    is_held_out = val is None and own is None
    if split == "train" or is_held_out:
        # A share that is held out is one of the training images.
        uri, wanted = train, "train"
    else:
        uri, wanted = val or train, own or split
    with open_source(uri, split=wanted) as source:
        if is_held_out:
            source = _hold_out(source, split, data.validation_fraction, data.seed)
        yield source


def _locate_splits(source: str, validation_source: str | None) -> tuple[str, str | None]:
    """Find the training and validation images of a source; None: there is no validation source.

    Raises:
        ConfigError: there are several beside the training images.
    """
    source = source.rstrip("/")  # `DIR/train/` is called `train` too
    train = f"{source}/train" if folder_exists(f"{source}/train") else source
    if validation_source is not None:
        return train, validation_source
    head, _, name = train.rpartition("/")
    if not name.startswith("train"):
        return train, None
    rest = name.removeprefix("train")
    names = [f"{head}/{word}{rest}" if head else f"{word}{rest}" for word in HELD_OUT_WORDS]
    found = [val for val in names if source_exists(val)]
    if len(found) > 1:
        raise ConfigError(
            f"data.validation_source: beside {train!r} are {', '.join(map(repr, found))}; name the "
            "one that holds the validation images"
        )
    return train, found[0] if found else None


def _hold_out(source: SourceListing, split: str, fraction: float, seed: int) -> SourceListing:
    # A seeded choice among the sorted names.
    num_val = round(len(source) * fraction)
    if not 0 < num_val < len(source):
        raise ConfigError(
            f"data.validation_fraction: {fraction} of the {len(source)} images of {source.uri} "
            f"leaves a split empty; change it, or name data.validation_source"
        )
    order = numpy_generator(seed, "held_out").permutation(len(source))
    rows = np.sort(order[:num_val] if split == "val" else order[num_val:])
    logger.info("%s: no validation images beside it; %d are held out", source.uri, num_val)
    return source.select(rows)
