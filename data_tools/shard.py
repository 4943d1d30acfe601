"""`fqgan-data shard`: make a dataset from a folder, a tar or the built-in photographs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.building import ShardingConfig, build_dataset
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.plan import plan_dataset
from fqgan_dist.sharding.sources.opening import BUILTIN_PHOTOGRAPHS, Progress, open_source

PartT = TypeVar("PartT", ShardingConfig, PhotographsConfig)

_PHOTOGRAPH_OPTIONS = ("image_size", "crops_per_photograph")


class ShardOptions(ShardingConfig, PhotographsConfig):
    """Options of `fqgan-data shard`.

    `image_size` and `crops_per_photograph` are for builtin:photographs only, and `seed` also places
    its crops.
    """

    subfolder: str = ""
    """Folder inside the source that holds the class folders."""
    classes: Path | None = None
    """File of class names, one per line in the order of their labels, perhaps followed by a tab and
    a readable name; None: the source's class folders, sorted."""
    workers: int = Field(default=4, ge=1)
    """Threads that read, check and encode images."""


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
    num_samples: int
    """Images in the dataset; in a dry run those that are named like images."""
    num_shards: int
    """Shards of the dataset."""
    num_built: int
    """Shards that this run wrote."""
    num_kept: int
    """Shards that an earlier run had written."""
    problems: list[dict[str, Any]]
    """What was left out: name, reason, action."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def shard(
    source_uri: str,
    destination: str,
    options: ShardOptions,
    *,
    is_dry_run: bool,
    progress: Progress,
) -> ShardSummary:
    """Make a dataset, or say what would be made.

    Raises:
        ConfigError: an option has no effect, or the class file is wrong.
        DataError: see `open_source` and `build_dataset`.
    """
    classes, descriptions = read_classes(options.classes) if options.classes else (None, {})
    storage = Storage(destination)
    with open_source(
        source_uri,
        subfolder=options.subfolder,
        split=options.split,
        photographs=_select_photographs(source_uri, options),
        progress=progress,
    ) as source:
        config = _select(options, ShardingConfig)
        used = set(source.class_names() if classes is None else classes)
        descriptions = {name: text for name, text in descriptions.items() if name in used}
        if is_dry_run:
            plan = plan_dataset(source, config, classes=classes, class_descriptions=descriptions)
            problems = [problem.model_dump() for problem in source.problems]
            sizes = len(plan.classes), plan.num_samples, len(plan.shards)
            return ShardSummary(storage.root, None, False, *sizes, 0, 0, problems)
        index, report = build_dataset(
            source,
            storage,
            "",
            config,
            classes=classes,
            class_descriptions=descriptions,
            workers=options.workers,
            progress=progress,
        )
    return ShardSummary(
        destination=storage.root,
        dataset_id=index.dataset_id,
        was_complete=report.was_complete,
        num_classes=index.num_classes,
        num_samples=index.num_samples,
        num_shards=len(index.shards),
        num_built=report.num_built,
        num_kept=report.num_kept,
        problems=[problem.model_dump() for problem in report.problems],
    )


def read_classes(path: Path) -> tuple[list[str], dict[str, str]]:
    """Read class names and their readable names, as in `n01443537<TAB>goldfish`.

    Raises:
        ConfigError: the file is missing, not text, empty, or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"classes: {path} cannot be read ({error}); name a text file") from error
    rows = [line.partition("\t") for line in lines if line.strip()]
    classes = [name.strip() for name, _, _ in rows]
    if not classes or len(set(classes)) != len(classes):
        raise ConfigError(f"classes: {path}: expected at least one class and none of them twice")
    return classes, {name.strip(): text.strip() for name, _, text in rows if text.strip()}


def _select_photographs(source_uri: str, options: ShardOptions) -> PhotographsConfig | None:
    if source_uri == BUILTIN_PHOTOGRAPHS:
        return _select(options, PhotographsConfig)
    for name in _PHOTOGRAPH_OPTIONS:
        if name in options.model_fields_set:
            raise ConfigError(f"{name}: has an effect on {BUILTIN_PHOTOGRAPHS} only; leave it out")
    return None


def _select(options: ShardOptions, config_type: type[PartT]) -> PartT:
    # Only what was given: the parts check that no setting is given without effect.
    given = options.model_fields_set & set(config_type.model_fields)
    return config_type(**{name: getattr(options, name) for name in given})
