"""`fqgan-data index`: an index for WebDataset shards that somebody else made, beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from data_tools.workers import count_workers
from fqgan_dist.sharding.class_files import read_classes
from fqgan_dist.sharding.foreign_index import IndexConfig, index_shards
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.uri import Location
from fqgan_dist.telemetry.observer import Observer


class IndexOptions(IndexConfig):
    """Options of `fqgan-data index`."""

    classes: Location | None = None
    """File of class names, one per line in the order of their labels, perhaps with a tab (behind a
    WordNet id, a space) and a readable name; none: the numbers or names that occur."""
    workers: int | None = Field(default=None, ge=1)
    """Processes that read shards; none: one per core."""


@dataclass(frozen=True)
class IndexSummary:
    """What `index` did."""

    source: str
    """Where the shards and now the index are."""
    dataset_id: str
    """The sha256 of the index."""
    was_complete: bool
    """Whether this very index was there."""
    num_classes: int
    """Classes."""
    num_samples: int
    """Images in the index."""
    num_shards: int
    """Shards in the index."""
    num_bytes: int
    """Bytes of these shards."""
    num_problems: int
    """What was left out; `index.problems.jsonl` names everything."""
    problems: list[dict[str, Any]]
    """The first of it: name, reason, action."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


def index(uri: str, options: IndexOptions, *, observer: Observer) -> IndexSummary:
    """Write an index beside shards.

    Raises:
        ConfigError: the class file is wrong.
        DataError: see `index_shards`.
    """
    classes, descriptions = read_classes(options.classes) if options.classes else (None, {})
    given = options.model_fields_set & set(IndexConfig.model_fields)
    storage = Storage(uri)
    report = index_shards(
        storage,
        IndexConfig(**{name: getattr(options, name) for name in given}),
        classes=classes,
        class_descriptions=descriptions,
        workers=count_workers(options.workers),
        observer=observer,
    )
    made = report.index
    return IndexSummary(
        source=storage.root,
        dataset_id=made.dataset_id,
        was_complete=report.was_complete,
        num_classes=made.num_classes,
        num_samples=made.num_samples,
        num_shards=len(made.shards),
        num_bytes=sum(shard.bytes for shard in made.shards),
        num_problems=made.num_problems,
        problems=[problem.model_dump() for problem in made.problems],
    )
