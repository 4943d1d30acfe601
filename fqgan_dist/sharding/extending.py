"""Add images to a dataset: new shards beside the old ones, which stay as they are.

An extension has a create-only plan of its own, `extension-NNNN.json` and `.parquet`, so that two
extensions of one dataset follow each other. The index is replaced last; the former one stays as
`index-<first 16 digits of its id>.json`, for runs that were started on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from fqgan_dist.chunks import RunChunks, run_in_processes
from fqgan_dist.config import Config, parse_config
from fqgan_dist.data.config import DEFAULT_SAMPLES_PER_SHARD
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    INDEX_NAME,
    DatasetIndex,
    SampleTable,
    former_index_name,
    image_digest,
    load_samples,
    parse_index,
)
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.building import (
    FinishedPlan,
    ShardingReport,
    check_remade,
    find_missing_files,
    run_plan,
)
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.listing import SourceListing
from fqgan_dist.sharding.plan import (
    LAYOUT,
    DatasetPlan,
    ShardingConfig,
    add_hash,
    assign_rows,
    find_unknown_classes,
    make_keys,
    make_stems,
)
from fqgan_dist.sharding.plan_files import PlanFile, load_plan, publish_plan
from fqgan_dist.sharding.problems import NUM_INDEXED_PROBLEMS, load_problems
from fqgan_dist.storage.documents import read_document
from fqgan_dist.storage.storage import Storage

_PLAN_NAME = re.compile(r"extension-([0-9]{4})\.json")
_CONCURRENT_READS = 16
_SHOWN_NAMES = 5


class ExtensionConfig(Config):
    """How a dataset is extended; the images get the form that the dataset's own have."""

    samples_per_shard: int = Field(default=DEFAULT_SAMPLES_PER_SHARD, ge=1)
    """Greatest number of images in a new shard."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of the new images."""
    new_classes: bool = False
    """Append classes that the dataset does not have yet; false: they are an error. Models that were
    trained on the former classes know nothing of new ones."""


@dataclass(frozen=True)
class ExtensionReport:
    """What an extension did."""

    work: ShardingReport
    """Shards and problems."""
    num_added: int = 0
    """Images that the dataset did not have."""
    num_present: int = 0
    """Images of the source that the dataset had already, by their keys."""
    added_classes: Sequence[str] = ()
    """Classes that the dataset did not have."""
    former_id: str = ""
    """Id of the dataset before."""


@dataclass(frozen=True, eq=False)
class PlannedExtension:
    """An extension before any image is read."""

    stem: str
    """Name of the plan's files without their endings."""
    base: Dataset
    """The dataset that is extended, as it was before."""
    plan: DatasetPlan
    """New images and shards."""
    config: ShardingConfig
    """How the shards are made."""
    num_present: int
    """Images of the source that the dataset has."""
    added_classes: list[str]
    """Classes that the dataset does not have."""


def extend_dataset(
    source: SourceListing,
    folder: Storage,
    config: ExtensionConfig,
    *,
    source_options: Mapping[str, Any] | None = None,
    run_chunks: RunChunks = run_in_processes,
    log_storage: Storage | None = None,
) -> tuple[DatasetIndex, ExtensionReport]:
    """Add the images of a source to a dataset, or what an interrupted call left to be added.

    Images whose key the dataset has are skipped. Classes keep their labels, new ones are appended.

    Args:
        source: the images.
        folder: of the dataset.
        config: what to do.
        source_options: how the source was opened, noted in the plan.
        run_chunks: makes the shards; it does not change the result.
        log_storage: where processes write log files; None: they write none.

    Returns:
        The new index, and what was done.

    Raises:
        DataError: there is no dataset, another extension is not finished, an image has a class
            that the dataset does not have, or another image with its key is there.
        ClusterError: from `run_chunks`.
    """
    dataset = Dataset.open(folder)
    extension = plan_extension(source, dataset, config)
    if extension is None:
        work = ShardingReport(True, 0, 0, load_problems(dataset))
        report = ExtensionReport(work, num_present=len(source), former_id=dataset.id)
        return dataset.index, report
    is_new = publish_plan(
        folder,
        extension.stem,
        extension.plan,
        source,
        extension.config,
        source_options=source_options or {},
        extends=extension.base.id,
    )
    done = run_plan(
        extension.plan,
        source,
        extension.config,
        folder,
        extension.stem,
        is_new=is_new,
        run_chunks=run_chunks,
        log_storage=log_storage,
        filled_classes=extension.base.index.classes,
    )
    report = ExtensionReport(
        work=done.report,
        num_added=sum(entry.count for entry in done.entries),
        num_present=extension.num_present,
        added_classes=extension.added_classes,
        former_id=extension.base.id,
    )
    return _replace_index(extension, done), report


def plan_extension(
    source: SourceListing, dataset: Dataset, config: ExtensionConfig
) -> PlannedExtension | None:
    """Find what is new in a source and assign it to new shards; None: nothing is left to do.

    Raises:
        DataError: as `extend_dataset`.
    """
    # By the request, not by the plan: when it is done, nothing is left that a plan could be made
    # of.
    request = _hash_request(source, config)
    if request in dataset.index.plans and not find_missing_files(dataset):
        return None
    stem, base = _choose_plan(dataset, request)
    index = base.index
    policy = ImagePolicy.parse_description(index.image_policy)
    keys = source.keys or make_keys(source.names)
    is_present = _find_present(source, keys, base, policy)
    rows = np.flatnonzero(~is_present)
    if not len(rows):
        return None
    added = _find_new_classes(source.select(rows), index, config)
    classes = [*index.classes, *added]
    descriptions = {
        name: text for name, text in source.class_descriptions.items() if name in added
    } | index.class_descriptions
    sharding = _inherit_config(index, policy, config)
    header = {
        "layout": LAYOUT,
        "request": request,
        "policy": sharding.describe_policy(),
        "classes": classes,
        "class_descriptions": descriptions,
    }
    plan = assign_rows(source, rows, sharding, header, keys=keys, name_shard=f"{stem}-{{:06d}}.tar")
    # Known by what was asked for, so that the same command finds itself done.
    plan = replace(plan, plan_sha256=request)
    return PlannedExtension(stem, base, plan, sharding, int(is_present.sum()), added)


def _hash_request(source: SourceListing, config: ExtensionConfig) -> str:
    """Hash what is asked for, whatever the dataset has of it already."""
    digest = hashlib.sha256()
    header = {"layout": LAYOUT, "seed": config.seed, "count": config.samples_per_shard}
    problems = [problem.model_dump() for problem in source.problems]
    digest.update(json.dumps([header, problems], sort_keys=True).encode())
    keys = source.keys or [None] * len(source)
    for line in zip(keys, source.names, source.sizes.tolist(), strict=True):
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _choose_plan(dataset: Dataset, request: str) -> tuple[str, Dataset]:
    """Find or choose the name of the plan, and find the dataset that it extends.

    Raises:
        DataError: another extension is not finished.
    """
    folder = dataset.folder
    matches = [_PLAN_NAME.fullmatch(name) for name in folder.list()]
    numbers = sorted(int(match[1]) for match in matches if match is not None)
    for number in numbers:
        stem = _name_plan(number)
        plan = load_plan(folder, stem)
        assert plan is not None, "it was listed"
        if plan.plan_sha256 == request:
            return stem, _open_base(dataset, plan, stem)
        if plan.plan_sha256 not in dataset.index.plans:
            raise DataError(
                f"{folder.uri(stem)}.json: an extension by {plan.source!r} is under way or was "
                "interrupted; expected at most one at a time: wait for it, finish it by the same "
                f"command, or delete its files {stem}* if no job runs"
            )
    return _name_plan(max(numbers, default=0) + 1), dataset


def _open_base(dataset: Dataset, plan: PlanFile, stem: str) -> Dataset:
    folder = dataset.folder
    if plan.extends is None:
        raise DataError(
            f"{folder.uri(stem)}.json: not the plan of an extension, which names the dataset that "
            f"it extends; delete the files {stem}* if no job runs"
        )
    if plan.extends == dataset.id:
        return dataset
    path = former_index_name(plan.extends)
    try:
        index = parse_index(read_document(folder, path), source=folder.uri(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder.uri(stem)}.json: it extends dataset {plan.extends[:16]}, and {INDEX_NAME} is "
            f"{dataset.id[:16]}; the index was replaced by hand: restore it, or delete the files "
            f"{stem}*"
        ) from error
    if index.dataset_id != plan.extends:
        raise DataError(
            f"{folder.uri(path)}: dataset {index.dataset_id[:16]}, expected {plan.extends[:16]} as "
            "its name says; restore it"
        )
    return Dataset(folder, index)


def _name_plan(number: int) -> str:
    return f"extension-{number:04d}"


def _find_present(
    source: SourceListing,
    keys: Sequence[str],
    dataset: Dataset,
    policy: ImagePolicy,
) -> np.ndarray:
    """Tell which images a dataset has, (n,) bool.

    The key of an image depends on its neighbours: where several names give one, all get a hash. So
    an image counts as present by either form of its key; by the form without a hash, which other
    names may have too, only if its bytes are the same.

    Raises:
        DataError: the dataset has another image with the same key, or it cannot be told.
    """
    rows_of: dict[str, list[int]] = {}
    for row, stem in enumerate(source.keys or make_stems(source.names)):
        rows_of.setdefault(stem, []).append(row)
    is_present = np.zeros(len(source), bool)
    conflicts: list[str] = []
    unclear: list[int] = []
    for table in _load_tables(dataset):
        for position, (key, size) in enumerate(zip(table.keys, table.sizes.tolist(), strict=True)):
            stem, _, _ = key.rpartition("-")
            rows = [
                *(row for row in rows_of.get(key, []) if keys[row] == key),
                *(row for row in rows_of.get(stem, []) if add_hash(stem, source.names[row]) == key),
            ]
            same = [row for row in rows if policy.is_lossy or source.sizes[row] == size]
            conflicts += [source.names[row] for row in rows if not same and keys[row] == key]
            others = [row for row in rows_of.get(key, []) if keys[row] != key]
            if policy.is_lossy:
                unclear += others
            else:
                digest = table.digests[position].tobytes()
                others = [row for row in others if source.sizes[row] == size]
                same += [row for row in others if image_digest(source.read(row)) == digest]
            is_present[same] = True
    uri = dataset.folder.uri(INDEX_NAME)
    if conflicts:
        raise DataError(
            f"{source.uri}: {len(conflicts)} images have the key of another image of {uri}, by "
            f"their sizes: {sorted(conflicts)[:_SHOWN_NAMES]!r}; rename them, or leave them out"
        )
    if names := sorted(source.names[row] for row in unclear if not is_present[row]):
        raise DataError(
            f"{source.uri}: {len(names)} images, of which {uri} has one of each name, as another "
            f"size: {names[:_SHOWN_NAMES]!r}; leave out those that it has, and rename the others"
        )
    return is_present


def _load_tables(dataset: Dataset) -> Iterator[SampleTable]:
    """Read all tables, some at a time: those of 12 million samples take gigabytes."""
    with ThreadPoolExecutor(_CONCURRENT_READS) as threads:
        for start in range(0, len(dataset.index.shards), _CONCURRENT_READS):
            shards = dataset.index.shards[start : start + _CONCURRENT_READS]
            yield from threads.map(partial(load_samples, dataset.folder), shards)


def _find_new_classes(
    source: SourceListing, index: DatasetIndex, config: ExtensionConfig
) -> list[str]:
    unknown = set(find_unknown_classes(source, index.classes))
    if unknown and not config.new_classes:
        raise DataError(
            f"{source.uri}: {len(unknown)} classes are not among the dataset's "
            f"{index.num_classes}: {sorted(unknown)[:_SHOWN_NAMES]!r}; correct the source, or "
            "append them with new_classes=true"
        )
    return [name for name in source.class_names() if name in unknown]


def _inherit_config(
    index: DatasetIndex, policy: ImagePolicy, config: ExtensionConfig
) -> ShardingConfig:
    """Give the settings of a dataset for its new shards.

    Raises:
        DataError: they are such as no dataset of ours has.
    """
    settings: dict[str, Any] = policy.model_dump(include=policy.model_fields_set)
    if index.image_policy.get("lossy_evaluation"):
        settings["allow_lossy_evaluation"] = True
    settings |= {"name": index.name, "split": index.split, "seed": config.seed}
    settings["samples_per_shard"] = config.samples_per_shard
    try:
        return parse_config(settings, ShardingConfig, source=INDEX_NAME)
    except ConfigError as error:
        raise DataError(f"{error}\ncopy the index from where it is whole") from None


def _replace_index(extension: PlannedExtension, done: FinishedPlan) -> DatasetIndex:
    """Publish the extension, unless another job with the same plan has done so.

    Raises:
        DataError: the index is neither the former nor the new one.
    """
    folder, base = extension.base.folder, extension.base.index
    request = extension.plan.plan_sha256
    tables = [done.problem_table] if done.problem_table else []
    changes = {
        "classes": extension.plan.classes,
        "class_descriptions": extension.plan.class_descriptions,
        "shards": [*base.shards, *done.entries],
        "plans": [*base.plans, request],
        "problems": [*base.problems, *done.report.problems][:NUM_INDEXED_PROBLEMS],
        "problem_tables": [*base.problem_tables, *tables],
    }
    former_values = {name: getattr(base, name) for name in DatasetIndex.model_fields}
    extended = DatasetIndex.model_validate(former_values | changes)
    # Kept before the new one replaces it: a run on the former dataset is told where its index is.
    former = former_index_name(base.dataset_id)
    try:
        folder.create_bytes(former, base.to_bytes())
    except FileExistsError as error:
        raise DataError(
            f"{folder.uri(former)}: not the index that its name says; delete it, and run the same "
            "command again"
        ) from error
    uri = folder.uri(INDEX_NAME)
    current_bytes = read_document(folder, INDEX_NAME)
    current = parse_index(current_bytes, source=uri)
    if request in current.plans:
        check_remade(Dataset(folder, current), done.entries)
        return current
    changed = DataError(
        f"{uri}: it was changed by hand while it was extended; restore it, and run the same "
        "command again"
    )
    if current.dataset_id != base.dataset_id:
        raise changed
    # Last, in one step: until then whoever reads sees the former dataset, whole.
    try:
        folder.replace_bytes(INDEX_NAME, extended.to_bytes(), former=current_bytes)
    except FileExistsError as error:
        raise changed from error
    return extended
