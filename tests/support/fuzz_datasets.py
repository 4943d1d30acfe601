"""Files of datasets for fuzzing: index, tables, plans, records."""

from __future__ import annotations

import functools
import io
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from support.byte_mutations import (
    dump_json,
    mutate_json,
    mutate_json_lines,
    splice,
)
from support.containers import write_zip
from support.file_mutations import (
    mutate_parquet,
    mutate_safetensors,
)
from support.fuzz_files import (
    FINGERPRINT,
    JSON,
    collect_files,
    make_tensor_file,
    sha256_of,
    sharding_config,
    spread_files,
)
from support.fuzzing import Target
from support.source_files import png
from support.tiny_shards import write_tiny_dataset

from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import (
    INDEX_NAME,
    DatasetIndex,
    ShardEntry,
    load_index,
    load_samples,
)
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.data.record_stores import CodeStore, FeatureStore
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.data.views import CropRecord
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.plan import PlannedShard, plan_dataset
from fqgan_dist.sharding.plan_files import (
    BASE_PLAN,
    PlanFile,
    PlannedRows,
    check_settings,
    load_plan,
    publish_plan,
)
from fqgan_dist.sharding.problems import load_problems
from fqgan_dist.sharding.sample_checks import check_shard
from fqgan_dist.sharding.sample_rules import SampleRules
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.zip_archive import ZipReader
from fqgan_dist.sharding.tasks import ShardFolder
from fqgan_dist.storage.storage import Storage

_SHARD = "shard-000000.tar"


@functools.cache
def _dataset() -> dict[str, bytes]:
    """Make the files of a dataset of two shards."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_dataset(Storage(folder), [3, 2])
        return collect_files(folder)


# The index and the tables of samples.


def _make_indices() -> list[bytes]:
    """Make the index of a dataset of ours, of one of smaller images, and of others' shards."""
    values = json.loads(_dataset()[INDEX_NAME])
    policies = (
        {"kind": "original", "order_seed": 0},
        {"kind": "short_side", "short_side": 64, "jpeg_quality": 90, "only_if_bigger": True},
        {"kind": "indexed", "class_key": "cls", "image_key": "png", "label_kind": "numbers"},
    )
    problem = {"name": "a", "reason": "b", "action": "skipped"}
    others = {"problems": [problem], "class_descriptions": {"class0": "x"}, "plans": ["0" * 64]}
    return [
        DatasetIndex.model_validate(values | others | {"image_policy": policy}).to_bytes()
        for policy in policies
    ]


def _read_index(data: bytes, folder: Path) -> None:
    storage = spread_files(folder, _dataset() | {INDEX_NAME: data})
    index = load_index(storage)
    dataset = Dataset(storage, index)
    _ = index.num_samples, index.num_problems, index.dataset_id, index.has_classes
    load_problems(dataset)
    SampleRules.of_dataset(index.image_policy)
    ImagePolicy.parse_description(index.image_policy)
    for entry in index.shards:
        load_samples(storage, entry)
        list(iterate_shard(storage, entry))
        check_shard(dataset, entry, is_foreign=True, left_out=[])


def _first_entry(**changes: Any) -> ShardEntry:
    index = DatasetIndex.model_validate_json(_dataset()[INDEX_NAME])
    return ShardEntry.model_validate(index.shards[0].model_dump() | changes)


def _read_samples(data: bytes, folder: Path) -> None:
    table = "shard-000000.samples.parquet"
    storage = spread_files(folder, _dataset() | {table: data})
    load_samples(storage, _first_entry(samples_sha256=sha256_of(data), bytes=2**63 - 1))
    list(iterate_shard(storage, _first_entry(samples_sha256=sha256_of(data))))


def _read_problem_table(data: bytes, folder: Path) -> None:
    name = "plan.problems.jsonl"
    index = json.loads(_dataset()[INDEX_NAME])
    index["problem_tables"] = [{"file": name, "count": 2, "sha256": sha256_of(data)}]
    storage = spread_files(folder, {name: data})
    load_problems(Dataset(storage, DatasetIndex.model_validate(index)))


# Plans, published shards and what processes tell each other.


@functools.cache
def _plan_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        source = write_zip(Path(folder) / "x", [("cat", png(1)), ("dog", png(2)), ("cat", png(3))])
        target = Storage(Path(folder) / "made")
        config = sharding_config()
        with open_source(str(source)) as listing:
            plan = plan_dataset(listing, config)
            publish_plan(target, BASE_PLAN, plan, listing, config, source_options={"format": "zip"})
        return collect_files(Path(folder) / "made") | {source.name: source.read_bytes()}


def _open_plan(file: str, data: bytes, folder: Path) -> tuple[Storage, PlanFile, PlannedRows]:
    """Open a whole plan, one of its files replaced."""
    storage = spread_files(folder, _plan_files() | {file: data})
    plan = load_plan(storage, BASE_PLAN)
    assert plan is not None, "it was written"
    return storage, plan, PlannedRows(storage, BASE_PLAN, plan.header_sha256)


def _read_plan(data: bytes, folder: Path) -> None:
    storage, plan, rows = _open_plan("plan.json", data, folder)
    for number, shard in enumerate(plan.shards):
        ShardFolder(storage).load(shard)
        rows.read(number, shard)
    check_settings(storage, sharding_config())


def _rehash(rows: PlannedRows, number: int, shard: PlannedShard) -> PlannedShard:
    """Give a shard the hash that its rows have, as far as it can be told."""
    try:
        rows.read(number, shard)
    except DataError as error:
        if found := re.search(r"have hash ([0-9a-f]{64})", str(error)):
            return shard.model_copy(update={"sha256": found[1]})
    return shard


def _read_plan_rows(data: bytes, folder: Path) -> None:
    storage, plan, rows = _open_plan("plan.parquet", data, folder)
    for number, shard in enumerate(plan.shards):
        shard = _rehash(rows, number, shard)
        for sample in rows.read(number, shard):
            ZipReader(storage).read(sample.name, sample.place)


@functools.cache
def _published_table() -> bytes:
    table = pq.read_table(io.BytesIO(_dataset()["shard-000000.samples.parquet"]))
    metadata = {
        "plan_sha256": "0" * 64,
        "tar_sha256": sha256_of(_dataset()[_SHARD]),
        "tar_bytes": str(len(_dataset()[_SHARD])),
        "problems": json.dumps([{"name": "a", "reason": "b", "action": "skipped"}]),
    }
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    return sink.getvalue()


def _read_published_shard(data: bytes, folder: Path) -> None:
    storage = spread_files(folder, _dataset() | {"shard-000000.samples.parquet": data})
    shards = ShardFolder(storage)
    shard = PlannedShard(file=_SHARD, count=3, sha256="0" * 64)
    shards.load(shard)
    shards.check(shard)


def _entry() -> ShardEntry:
    return ShardEntry(file=_SHARD, count=3, bytes=1024, sha256="1" * 64, samples_sha256="2" * 64)


_KEYS = ["a", "b", "c"]
_CROP = CropRecord(1, 2, 256, 300, flip=True)


def _make_features() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Storage(folder), "f", FINGERPRINT)
        features = {"clip": np.ones((3, 12)), "dinov2": np.zeros((3, 5))}
        store.write(_entry(), 1, keys=_KEYS, crops=[_CROP] * 3, features=features)
        return list(collect_files(folder).values())


def _read_features(data: bytes, folder: Path) -> None:
    store = FeatureStore(Storage(folder), "f", FINGERPRINT)
    spread_files(folder, {store.path(_entry(), 1): _reseal_records(data)})
    store.read(_entry(), 1, _KEYS)


def _make_codes() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = CodeStore(Storage(folder), "c", FINGERPRINT)
        codes = np.arange(3 * 2 * 2 * 4).reshape(3, 2, 2, 2, 2)
        books, crops = ["visual", "semantic"], [[_CROP] * 2] * 3
        store.write(_entry(), keys=_KEYS, crops=crops, codes=codes, codebooks=books)
        return list(collect_files(folder).values())


def _read_codes(data: bytes, folder: Path) -> None:
    store = CodeStore(Storage(folder), "c", FINGERPRINT)
    spread_files(folder, {store.path(_entry()): _reseal_records(data)})
    store.read(_entry(), _KEYS)
    store.read_drawn(_entry(), _KEYS, lambda key, count: len(key) % count)


def _reseal_records(data: bytes) -> bytes:
    """Put the hash into a file's metadata that its reader will find, as far as it can be told."""
    from fqgan_dist.data import records

    key = b"fqgan_records"
    try:
        metadata = records._read_metadata(data)
        parquet = read_table(data, records._make_schema(metadata.columns), max_rows=10**6)
        found = records._hash_content(records._read_table(parquet, metadata))
        footer = json.loads(pq.read_metadata(io.BytesIO(data)).metadata[key])
        table = pq.read_table(io.BytesIO(data), use_threads=False)
    except Exception:  # noqa: BLE001  the reader will say so
        return data
    footer["content_sha256"] = found
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({key: json.dumps(footer)}), sink)
    return sink.getvalue()


def _read_tensor_file(data: bytes, folder: Path) -> None:
    spread_files(folder, {f"x/{FINGERPRINT}/chunk-000000.safetensors": data})
    _ = TensorFiles(Storage(folder), "x", FINGERPRINT).read(0)["0.weight"]


def _of_dataset(name: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [_dataset()[name]]


def _mutate_index(data: bytes, random: Random) -> bytes:
    # Canonical, or it is refused for not being so.
    return (
        dump_json(
            mutate_json(json.loads(data), random), indent=1, sort_keys=True, ensure_ascii=False
        )
        + b"\n"
    )


TARGETS: tuple[Target, ...] = (
    Target("index", _make_indices, splice([_mutate_index] * 4 + [JSON]), _read_index),
    Target(
        "table of samples",
        _of_dataset("shard-000000.samples.parquet"),
        mutate_parquet,
        _read_samples,
    ),
    Target(
        "table of problems",
        lambda: [b'{"name": "a", "reason": "b", "action": "skipped"}\n' * 2],
        mutate_json_lines,
        _read_problem_table,
    ),
    Target("plan", lambda: [_plan_files()["plan.json"]], JSON, _read_plan),
    Target(
        "rows of a plan",
        lambda: [_plan_files()["plan.parquet"]],
        mutate_parquet,
        _read_plan_rows,
    ),
    Target("published shard", lambda: [_published_table()], mutate_parquet, _read_published_shard),
    Target("features", _make_features, mutate_parquet, _read_features),
    Target("codes", _make_codes, mutate_parquet, _read_codes),
    Target("tensor file", make_tensor_file, mutate_safetensors, _read_tensor_file),
)
