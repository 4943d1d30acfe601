"""The `shards` stage: training and validation images as WebDataset shards."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import numpy as np

from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS, USUAL_VIEW_SHORT_SIDE, DataConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.randomness import numpy_generator
from fqgan_dist.sharding.building import ShardingReport, build_dataset
from fqgan_dist.sharding.class_files import read_classes
from fqgan_dist.sharding.config import NO_CLASSES, SourceOptions
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.plan import ShardingConfig, check_classes
from fqgan_dist.sharding.plan_files import check_settings
from fqgan_dist.sharding.sources.locations import folder_exists, source_exists
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.options import name_options
from fqgan_dist.sharding.sources.splits import find_sources_beside, find_split_folder
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.data_checks import check_sizes
from fqgan_dist.stages.stage import (
    DataSizes,
    RunContext,
    Stage,
    StageOutcome,
    StageOutput,
    find_stages,
)
from fqgan_dist.storage.names import is_remote
from fqgan_dist.storage.storage import Storage

OptionsField = Literal["source_options", "validation_options"]

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
        # Records of older runs do not name these; as they were then, nothing is said of them.
        newer = {"source_options", "validation_options", "classes"}
        settings |= data.model_dump(mode="json", include=newer, exclude_defaults=True)
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
        data = config.data
        for field in ("source", "validation_source"):
            source = getattr(data, field)
            if source in (None, BUILTIN_PHOTOGRAPHS) or is_remote(source):
                continue
            if not source_exists(source):
                yield (
                    f"data.{field}: {source!r}: no such file or folder; expected a folder of class "
                    f"folders, a tar, zip, shards, parquet, a manifest or {BUILTIN_PHOTOGRAPHS}"
                )
        beside = {
            "source_options.root": data.source_options.root,
            "source_options.class_map": data.source_options.class_map,
            "validation_options.root": data.validation_options.root,
            "validation_options.class_map": data.validation_options.class_map,
            "classes": data.classes,
        }
        for field, uri in beside.items():
            if uri is not None and not is_remote(uri) and not source_exists(uri):
                yield f"data.{field}: {uri!r}: no such file or folder; correct the path"

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        config = self.context.config
        ids: dict[str, str] = {}
        metrics: dict[str, Any] = {}
        for split in SPLITS:
            check_settings(self._folder(split), self._configure(split))
        named = config.data.classes
        # Both are listed before one is written, which takes hours; the class list is train's.
        with _open_splits(self.context) as sources:
            train, val = (sources[split] for split in SPLITS)
            classes, descriptions = read_classes(named) if named else (train.class_names(), None)
            with _named_options("source_options"):
                check_classes(train, classes, of=f"data.classes {named!r}")
            val_has_classes = val.has_classes or not train.has_classes
            if val_has_classes:
                with _named_options(_validation_field(config.data)):
                    check_classes(val, classes, of="the training images")
            sizes = DataSizes(len(train), len(val), len(classes), val_has_classes)
            check_sizes(find_stages(config), config, sizes)
            for split, source in sources.items():
                own = classes if split == "train" or val_has_classes else None
                index, report = self._build(source, split, own, descriptions, run_chunks)
                ids[split] = index.dataset_id
                metrics[f"{self.name}/{split}_images"] = index.num_samples
                metrics[f"{self.name}/{split}_problems"] = len(report.problems)
        metrics[f"{self.name}/classes"] = len(classes)
        return StageOutcome(DatasetIds(**ids), metrics)

    def _build(
        self,
        source: SourceListing,
        split: str,
        classes: list[str] | None,
        class_descriptions: Mapping[str, str] | None,
        run_chunks: RunChunks,
    ) -> tuple[DatasetIndex, ShardingReport]:
        return build_dataset(
            source,
            self._folder(split),
            self._configure(split),
            classes=classes,
            class_descriptions=class_descriptions,
            run_chunks=run_chunks,
            log_storage=self.context.storage,
        )

    def _folder(self, split: str) -> Storage:
        return self.context.storage.child(_split_path(self.context, split))

    def _configure(self, split: str) -> ShardingConfig:
        data = self.context.config.data
        return ShardingConfig(
            name=data.name,
            split=split,
            samples_per_shard=data.samples_per_shard,
            seed=data.seed,
            # Validation keeps its bytes: it is the reference of rFID.
            short_side=data.short_side if split == "train" else None,
            view_short_side=_view_short_side(self.context.config, split),
        )


def open_dataset(context: RunContext, split: str) -> Dataset:
    """Open a split of a run's finished dataset.

    Raises:
        DataError: the stage has not finished, or the dataset is another one by now.
    """
    dataset_id = getattr(context.read(DatasetIds), split)
    folder = context.storage_of(DatasetIds.stage).child(_split_path(context, split))
    return Dataset.open(folder, expected_id=dataset_id)


def measure_data(context: RunContext) -> DataSizes:
    """Measure a run's finished dataset; raises what `open_dataset` does."""
    train, val = (open_dataset(context, split).index for split in SPLITS)
    val_has_classes = val.has_classes or not train.has_classes
    return DataSizes(train.num_samples, val.num_samples, train.num_classes, val_has_classes)


def _view_short_side(config: RunConfig, split: str) -> int:
    """Return what images must be good for: the views in use, or the usual ones if smaller."""
    views = (config.data.views, config.codes.views) if split == "train" else ()
    sides = (view.greatest_short_side for view in views)
    return max(USUAL_VIEW_SHORT_SIDE, config.tokenizer.model.image_size, *sides)


def _split_path(context: RunContext, split: str) -> str:
    """Name the folder of a split's shards, below the root of a run."""
    return f"data/{context.config.data.name}/{split}"


@contextmanager
def _open_splits(context: RunContext) -> Iterator[dict[str, SourceListing]]:
    """List the images of both splits: each has its own source, or val a share of the only one."""
    data = context.config.data
    with ExitStack() as stack:
        if data.source == BUILTIN_PHOTOGRAPHS:
            yield {split: stack.enter_context(_open_photographs(data, split)) for split in SPLITS}
            return
        train_uri, val_uri = _locate_splits(
            data.source,
            data.validation_source,
            has_classes=data.source_options.class_key != NO_CLASSES,
        )
        train = stack.enter_context(_open(train_uri, "train", data, "source_options"))
        own = next((name for name in ("val", "test") if name in train.other_splits), None)
        if val_uri is not None:
            own = None
        elif own is None:
            yield _hold_out(train, data.validation_fraction, data.seed)
            return
        field = _validation_field(data)
        val = stack.enter_context(_open(val_uri or train_uri, own or "val", data, field))
        yield {"train": train, "val": val}


@contextmanager
def _open(
    uri: str,
    split: str,
    data: DataConfig,
    field: OptionsField,
    *,
    photographs: PhotographsConfig | None = None,
) -> Iterator[SourceListing]:
    options: SourceOptions = getattr(data, field)
    given = options.model_dump(exclude_defaults=True)
    with ExitStack() as stack:
        with _named_options(field):
            opened = open_source(uri, split=split, photographs=photographs, **given)
            listing = stack.enter_context(opened)
        yield listing


@contextmanager
def _named_options(field: OptionsField) -> Iterator[None]:
    """Say what is wrong by the names that the options of sources have in a run."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(name_options(str(error), f"data.{field}.")) from error


def _validation_field(data: DataConfig) -> OptionsField:
    """Name the options by which validation images are read."""
    return "source_options" if data.validation_source is None else "validation_options"


def _open_photographs(data: DataConfig, split: str) -> AbstractContextManager[SourceListing]:
    crops = data.crops_per_photograph
    photographs = PhotographsConfig(
        image_size=data.views.image_size,
        crops_per_photograph=crops if split == "train" else max(1, crops // PHOTOGRAPHS_VAL_SHARE),
        seed=data.seed,
    )
    return _open(data.source, split, data, "source_options", photographs=photographs)


def _locate_splits(
    source: str, validation_source: str | None, *, has_classes: bool = True
) -> tuple[str, str | None]:
    """Find the training and validation images of a source; None: there is no validation source.

    Raises:
        ConfigError: there are several beside the training images.
    """
    source = source.rstrip("/")  # `DIR/train/` is called `train` too
    chosen = None
    if folder_exists(source):
        chosen, _ = find_split_folder(source, "train", has_classes=has_classes)
    train = source if chosen is None else f"{source}/{chosen}"
    if validation_source is not None:
        return train, validation_source
    found = find_sources_beside(train)
    if len(found) > 1:
        raise ConfigError(
            f"data.validation_source: beside {train!r} are {', '.join(map(repr, found))}; name the "
            "one that holds the validation images"
        )
    return train, found[0] if found else None


def _hold_out(source: SourceListing, fraction: float, seed: int) -> dict[str, SourceListing]:
    """Part a source into both splits, by a seeded choice among the sorted names."""
    num_val = round(len(source) * fraction)
    if not 0 < num_val < len(source):
        raise ConfigError(
            f"data.validation_fraction: {fraction} of the {len(source)} images of {source.uri} "
            f"leaves a split empty; change it, or name data.validation_source"
        )
    order = numpy_generator(seed, "held_out").permutation(len(source))
    logger.info("%s: no validation images beside it; %d are held out", source.uri, num_val)
    rows = {"train": order[num_val:], "val": order[:num_val]}
    return {split: source.select(np.sort(chosen)) for split, chosen in rows.items()}
