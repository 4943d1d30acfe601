"""Every reader of files that somebody else may have written: a valid file, its damage, the reading.

What a reader checks by a hash that stands elsewhere is made to fit the damaged bytes, since whoever
wrote them wrote the hash too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from PIL import Image
from support.containers import write_parquet, write_zip
from support.fuzzing import Target
from support.mutations import (
    archive_mutator,
    dump_json,
    json_mutator,
    mutate_bytes,
    mutate_image,
    mutate_json,
    mutate_json_lines,
    mutate_npy,
    mutate_parquet,
    mutate_pickle,
    mutate_safetensors,
    mutate_tar,
    mutate_text,
    mutate_yaml,
    mutate_zip,
    splice,
)
from support.source_files import png, tar_bytes
from support.tiny_shards import write_tiny_dataset

from fqgan_dist.config import load_config
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.decoding import decode_image, decode_jpeg, read_jpeg_header, read_size
from fqgan_dist.data.index import (
    INDEX_NAME,
    DatasetIndex,
    ShardEntry,
    load_index,
    load_samples,
)
from fqgan_dist.data.parquet_tables import read_table
from fqgan_dist.data.records import CodeStore, FeatureStore
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.data.views import CropRecord
from fqgan_dist.diagnosis.weights import check_file
from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.moments import Moments, load_adm_statistics
from fqgan_dist.evaluation.reference import ReferenceStatistics
from fqgan_dist.sharding.class_files import read_class_map, read_classes
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.foreign_scan import ShardScan, scan_shard
from fqgan_dist.sharding.images import ImagePolicy
from fqgan_dist.sharding.plan import PlannedShard, ShardingConfig, plan_dataset
from fqgan_dist.sharding.plan_files import (
    BASE_PLAN,
    PlannedRows,
    check_settings,
    load_plan,
    publish_plan,
)
from fqgan_dist.sharding.problems import load_problems
from fqgan_dist.sharding.sample_checks import check_shard
from fqgan_dist.sharding.sample_rules import SampleRules
from fqgan_dist.sharding.sources.file_list import read_image_list
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.sharding.sources.zip_archive import ZipReader
from fqgan_dist.sharding.tasks import ShardFolder
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage_record import (
    StageRecord,
    check_inputs,
    has_inputs,
    load_record,
    save_record,
)
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import parse_records
from fqgan_dist.telemetry.observer import SILENT
from fqgan_dist.tokenizer.published import read_published_file
from fqgan_dist.training.checkpoint import CheckpointStore, Fragment
from fqgan_dist.training.checkpoint_attempt import Attempt
from fqgan_dist.training.checkpoint_format import RankReport, checkpoint_folder
from fqgan_dist.training.commit_log import CommitRecord, canonical_json, seal, sha256_hex
from fqgan_dist.training.config import RetentionPolicy
from fqgan_dist.weights.files import load_safetensors_checked, load_torch_checked
from fqgan_dist.weights.tensors import hash_tensors, load_into
from fqgan_dist.yaml_text import parse_yaml

_TINY_CONFIG = Path(__file__).parent / "tiny.yaml"
_FINGERPRINT = "0123456789abcdef"
_SHARD = "shard-000000.tar"
_ATTEMPT = "a" * 32
_MANY = 300
"""Rows of a listing that are read, at most."""


@functools.cache
def _dataset() -> dict[str, bytes]:
    """Make the files of a dataset of two shards."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_dataset(Storage(folder), [3, 2])
        return _collect(folder)


def _collect(folder: str | Path) -> dict[str, bytes]:
    root = Path(folder)
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def _spread(folder: Path, files: dict[str, bytes]) -> Storage:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Storage(folder)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
    storage = _spread(folder, _dataset() | {INDEX_NAME: data})
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
    storage = _spread(folder, _dataset() | {table: data})
    load_samples(storage, _first_entry(samples_sha256=_sha256(data), bytes=2**63 - 1))
    list(iterate_shard(storage, _first_entry(samples_sha256=_sha256(data))))


def _read_problem_table(data: bytes, folder: Path) -> None:
    name = "plan.problems.jsonl"
    index = json.loads(_dataset()[INDEX_NAME])
    index["problem_tables"] = [{"file": name, "count": 2, "sha256": _sha256(data)}]
    storage = _spread(folder, {name: data})
    load_problems(Dataset(storage, DatasetIndex.model_validate(index)))


# Plans, published shards and what processes tell each other.


@functools.cache
def _plan_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        source = write_zip(Path(folder) / "x", [("cat", png(1)), ("dog", png(2)), ("cat", png(3))])
        target = Storage(Path(folder) / "made")
        config = _sharding()
        with open_source(str(source)) as listing:
            plan = plan_dataset(listing, config)
            publish_plan(target, BASE_PLAN, plan, listing, config, source_options={"format": "zip"})
        return _collect(Path(folder) / "made") | {source.name: source.read_bytes()}


def _sharding() -> ShardingConfig:
    return ShardingConfig(name="x", split="train", samples_per_shard=2)


def _read_plan(data: bytes, folder: Path) -> None:
    storage = _spread(folder, _plan_files() | {"plan.json": data})
    plan = load_plan(storage, BASE_PLAN)
    assert plan is not None, "it was written"
    rows = PlannedRows(storage, BASE_PLAN, plan.header_sha256)
    for number, shard in enumerate(plan.shards):
        ShardFolder(storage).load(shard)
        rows.read(number, shard)
    check_settings(storage, _sharding())


def _rehash(rows: PlannedRows, number: int, shard: PlannedShard) -> PlannedShard:
    """Give a shard the hash that its rows have, as far as it can be told."""
    try:
        rows.read(number, shard)
    except DataError as error:
        if found := re.search(r"have hash ([0-9a-f]{64})", str(error)):
            return shard.model_copy(update={"sha256": found[1]})
    return shard


def _read_plan_rows(data: bytes, folder: Path) -> None:
    storage = _spread(folder, _plan_files() | {"plan.parquet": data})
    plan = load_plan(storage, BASE_PLAN)
    assert plan is not None, "it was written"
    rows = PlannedRows(storage, BASE_PLAN, plan.header_sha256)
    for number, shard in enumerate(plan.shards):
        shard = _rehash(rows, number, shard)
        for sample in rows.read(number, shard):
            ZipReader(storage).read(sample.name, sample.place)


@functools.cache
def _published_table() -> bytes:
    table = pq.read_table(io.BytesIO(_dataset()["shard-000000.samples.parquet"]))
    metadata = {
        "plan_sha256": "0" * 64,
        "tar_sha256": _sha256(_dataset()[_SHARD]),
        "tar_bytes": str(len(_dataset()[_SHARD])),
        "problems": json.dumps([{"name": "a", "reason": "b", "action": "skipped"}]),
    }
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    return sink.getvalue()


def _read_published_shard(data: bytes, folder: Path) -> None:
    storage = _spread(folder, _dataset() | {"shard-000000.samples.parquet": data})
    shards = ShardFolder(storage)
    shard = PlannedShard(file=_SHARD, count=3, sha256="0" * 64)
    shards.load(shard)
    shards.check(shard)


# Records of stages; records, features and tensors of chunks.


def _make_stage_record() -> list[bytes]:
    record = StageRecord(
        stage="tokenizer",
        state="done",
        inputs={"upstream.shards": "d" * 64, "training.steps": 6, "model.lr": 0.5, "x": [1, None]},
        outputs={"step": 6, "folder": "tokenizer"},
        metrics={"rfid": 1.5},
        history={"training.steps": [3]},
    )
    with tempfile.TemporaryDirectory() as folder:
        save_record(Storage(folder), "a.json", record)
        return [(Path(folder) / "a.json").read_bytes()]


def _read_stage_record(data: bytes, folder: Path) -> None:
    record = load_record(_spread(folder, {"a.json": data}), "a.json")
    assert record is not None, "it was written"
    inputs = {"upstream.shards": "d" * 64, "training.steps": 8, "model.lr": 0.5, "x": [1, None]}
    has_inputs(record, inputs)
    check_inputs(record, inputs, source="a", growing=["training.steps"])


def _entry() -> ShardEntry:
    return ShardEntry(file=_SHARD, count=3, bytes=1024, sha256="1" * 64, samples_sha256="2" * 64)


_KEYS = ["a", "b", "c"]
_CROP = CropRecord(1, 2, 256, 300, flip=True)


def _make_features() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Storage(folder), "f", _FINGERPRINT)
        features = {"clip": np.ones((3, 12)), "dinov2": np.zeros((3, 5))}
        store.write(_entry(), 1, keys=_KEYS, crops=[_CROP] * 3, features=features)
        return list(_collect(folder).values())


def _read_features(data: bytes, folder: Path) -> None:
    store = FeatureStore(Storage(folder), "f", _FINGERPRINT)
    _spread(folder, {store.path(_entry(), 1): _reseal_records(data)})
    store.read(_entry(), 1, _KEYS)


def _make_codes() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        store = CodeStore(Storage(folder), "c", _FINGERPRINT)
        codes = np.arange(3 * 2 * 2 * 4).reshape(3, 2, 2, 2, 2)
        books, crops = ["visual", "semantic"], [[_CROP] * 2] * 3
        store.write(_entry(), keys=_KEYS, crops=crops, codes=codes, codebooks=books)
        return list(_collect(folder).values())


def _read_codes(data: bytes, folder: Path) -> None:
    store = CodeStore(Storage(folder), "c", _FINGERPRINT)
    _spread(folder, {store.path(_entry()): _reseal_records(data)})
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
    _spread(folder, {f"x/{_FINGERPRINT}/chunk-000000.safetensors": data})
    TensorFiles(Storage(folder), "x", _FINGERPRINT).read(0)


# Checkpoints.


@functools.cache
def _run_files() -> dict[str, bytes]:
    """Make a run's checkpoints: two commits, of two steps."""
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Storage(folder), "t", rank_timeout_s=5)
        with store.begin_attempt() as attempt:
            for step in (2, 4):
                attempt.save(
                    step,
                    tensors={
                        "weights": {
                            "a": torch.ones(2, 3),
                            "b": Fragment(torch.zeros(4), 0, (2, 2)),
                            "c": torch.ones(3, dtype=torch.bfloat16),
                        },
                        "optimizer": {"a.step": torch.tensor(1.0)},
                    },
                    state={"images_seen": 1},
                    metrics={"loss": 0.5},
                    config={"width": 3},
                    dataset_id="d" * 64,
                )
                attempt.wait()
        return _collect(folder)


def _commit_name() -> str:
    return max(name for name in _run_files() if name.startswith("t/commits/"))


def _commit() -> CommitRecord:
    return CommitRecord.model_validate(json.loads(_run_files()[_commit_name()])["content"])


def _use_checkpoints(folder: Path, files: dict[str, bytes]) -> None:
    store = CheckpointStore(_spread(folder, _run_files() | files), "t")
    store.list_commits()
    store.verify()
    loaded = store.load_latest()
    if loaded is not None:
        for part in loaded.manifest.parts:
            loaded.tensor_shapes(part)
            loaded.read(part)
    policy = RetentionPolicy(keep_last=1, keep_every=2, best_metric="loss")
    store.prune(policy)


def _read_commit(data: bytes, folder: Path) -> None:
    _use_checkpoints(folder, {_commit_name(): _reseal(data)})


def _reseal(data: bytes) -> bytes:
    """Put the right checksum into a sealed document."""
    try:
        value = parse_json(data)
        return canonical_json(value | {"sha256": sha256_hex(canonical_json(value["content"]))})
    except (ValueError, KeyError, TypeError):
        return data


def _read_manifest(data: bytes, folder: Path) -> None:
    commit = _commit().model_copy(update={"manifest_sha256": sha256_hex(data)})
    path = f"t/{checkpoint_folder(commit.step, commit.attempt)}/manifest.json"
    _use_checkpoints(folder, {path: data, _commit_name(): seal(commit)})


def _manifest() -> bytes:
    commit = _commit()
    return _run_files()[f"t/{checkpoint_folder(commit.step, commit.attempt)}/manifest.json"]


def _weights_file() -> str:
    commit = _commit()
    start = f"t/{checkpoint_folder(commit.step, commit.attempt)}/weights."
    return next(name for name in _run_files() if name.startswith(start))


def _read_checkpoint_tensors(data: bytes, folder: Path) -> None:
    manifest = json.loads(_manifest())
    name = _weights_file()
    for file in manifest["files"]:
        if name.endswith(file["file"]):
            file["bytes"], file["sha256"] = max(1, len(data)), _sha256(data)
    encoded = canonical_json(manifest)
    commit = _commit().model_copy(update={"manifest_sha256": sha256_hex(encoded)})
    manifest_path = f"{name.rpartition('/')[0]}/manifest.json"
    _use_checkpoints(folder, {name: data, manifest_path: encoded, _commit_name(): seal(commit)})


def _make_rank_report() -> list[bytes]:
    manifest = json.loads(_manifest())
    files = [{**each, "tensors": {}} for each in manifest["files"]]
    values = {"step": 4, "attempt": _ATTEMPT, "rank": 1, "world_size": 2}
    parts = {"parts": manifest["parts"], "files": files}
    return [seal(RankReport.model_validate(values | parts))]


def _read_rank_report(data: bytes, folder: Path) -> None:
    path = f"{checkpoint_folder(4, _ATTEMPT)}/rank-00001.json"
    storage = _spread(folder, {path: _reseal(data)})
    store = CheckpointStore(storage, "", rank_timeout_s=5)
    del store
    attempt = Attempt(
        storage,
        attempt_id=_ATTEMPT,
        rank=0,
        world_size=2,
        log=None,
        rotate=lambda _: None,
        rank_timeout_s=5,
    )
    attempt._read_report(checkpoint_folder(4, _ATTEMPT), 1)


# Weights.


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.zeros(2),
        "1.weight": torch.ones(1, 2, dtype=torch.float16),
        "1.bias": torch.tensor([3]),
    }


def _read_weights(data: bytes, folder: Path) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    check_file("weights", str(path), None)
    tensors = load_safetensors_checked(path, _sha256(data))
    hash_tensors(tensors)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    load_into(network, tensors, source="x")


def _make_torch_files(content: Any) -> list[bytes]:
    found = []
    for is_zip in (True, False):
        sink = io.BytesIO()
        torch.save(content, sink, _use_new_zipfile_serialization=is_zip)
        found.append(sink.getvalue())
    return found


def _make_published() -> list[bytes]:
    return _make_torch_files({"ema": _tensors(), "args": argparse.Namespace(a=1), "steps": 3})


def _mutate_torch(data: bytes, random: Random) -> bytes:
    if data.startswith(b"PK"):
        return archive_mutator({"data.pkl": mutate_pickle, "": mutate_bytes})(data, random)
    return mutate_pickle(data, random)


def _read_torch_file(data: bytes, folder: Path) -> None:
    path = folder / "x.pth"
    path.write_bytes(data)
    hash_tensors(load_torch_checked(path, _sha256(data)))


def _read_published_weights(data: bytes, folder: Path) -> None:
    path = folder / "x.pt"
    path.write_bytes(data)
    hash_tensors(read_published_file(path))


def _make_moments() -> list[bytes]:
    return [Moments(3, np.zeros(4), np.eye(4)).to_bytes()]


def _make_reference() -> list[bytes]:
    moments = Moments(3, np.zeros(4), np.eye(4))
    reference = ReferenceStatistics(
        kind="rfid", reference_id="a", evaluator_id="b", moments=moments
    )
    return [reference.to_bytes()]


def _mutate_reference(data: bytes, random: Random) -> bytes:
    line, _, rest = data.partition(b"\n")
    if random.random() < 0.5:
        return line + b"\n" + mutate_safetensors(rest, random)
    return json_mutator()(line, random) + b"\n" + rest


def _make_adm() -> list[bytes]:
    sink = io.BytesIO()
    np.savez(sink, mu=np.zeros(4), sigma=np.eye(4), count=np.array(5))
    return [sink.getvalue()]


def _read_adm(data: bytes, folder: Path) -> None:
    moments, _ = load_adm_statistics(io.BytesIO(data), name="x")
    _ = moments.to_bytes()


# Texts: settings, lists, classes, lines of JSON.


def _read_config(data: bytes, folder: Path) -> None:
    path = folder / "x.yaml"
    path.write_bytes(data)
    load_config(path, [f"storage.root={folder}"], RunConfig)


def _make_overrides() -> list[bytes]:
    lines = ["name=x", "tokenizer.model.codebooks.1.name=y", "samples.count=3", "num_threads=2"]
    return ["\n".join(lines).encode()]


def _read_overrides(data: bytes, folder: Path) -> None:
    load_config(_TINY_CONFIG, data.decode(errors="replace").split("\n"), RunConfig)


def _read_yaml_text(data: bytes, folder: Path) -> None:
    parse_yaml(data.decode(errors="replace"))


_LISTS = {
    "csv": "path,class,key\na/x.jpg,cat,k1\na/y.jpg,dog,k2\nz.png,3,k3\n",
    "tsv": "x.JPEG\tn01440764\t0\t0\t62\t62\ny.JPEG\tn01443537\t1\t2\t3\t4\n",
    "txt": "a/x.jpg 1\na/y.jpg 2\nb/z.webp 3\n",
    "jsonl": '{"path": "a/x.jpg", "class": 1}\n{"path": "b.png", "class": "dog", "key": "k"}\n',
}


def _list_reader(ending: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        for options in (SourceOptions(), SourceOptions(keep_keys=False)):
            with SILENT.track(None, "x", "rows") as bar:
                images = read_image_list(io.BytesIO(data), f"x.{ending}", options, bar)
            _ = images.start

    return read


def _list_source_reader(ending: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        images = {name: png(1) for name in ("a/x.jpg", "a/y.jpg", "z.png", "b/z.webp", "x.JPEG")}
        _spread(folder, images | {f"x.{ending}": data})
        _use_source(folder / f"x.{ending}")

    return read


def _class_file_reader(reader: Callable[[str], object]) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        path = folder / "classes.txt"
        path.write_bytes(data)
        reader(str(path))

    return read


def _make_class_files() -> list[bytes]:
    texts = ("cat\ndog\n", "n01440764\ttench\nn01443537 goldfish\n", "0 cat\n1, dog\n2\tbird\n")
    return [text.encode() for text in texts]


def _make_metrics() -> list[bytes]:
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "x": [1]}]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


# Sources: archives, tables and shards of others.


def _shard_tar() -> bytes:
    return tar_bytes(
        [
            ("a/1.png", png(1)),
            ("a/1.cls", b"3"),
            ("a/2.png", png(2)),
            ("a/2.json", b'{"label": "cat", "x": [1, 2]}'),
            ("a/2.cls", b"cat"),
            ("b.pkl", b"x"),
            ("c.webp", b"RIFF"),
            ("c.cls", b"-1"),
        ]
    )


def _read_foreign_shard(data: bytes, folder: Path) -> None:
    storage = _spread(folder, {"a.tar": data})
    for rules in (SampleRules(), SampleRules(class_key="json.label")):
        scan = scan_shard(storage, "a.tar", rules, is_deep=True)
        ShardScan.from_bytes(scan.to_bytes())


def _use_source(path: Path, **options: Any) -> None:
    with open_source(str(path), **options) as listing:
        listing.class_names()
        for row in range(min(len(listing), _MANY)):
            listing.read(row)
        plan_dataset(listing, _sharding())


def _source_reader(name: str, **options: Any) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        (folder / name).write_bytes(data)
        _use_source(folder / name, **options)

    return read


def _make_image_tar() -> list[bytes]:
    plain = tar_bytes([("cat/1.png", png(1)), ("cat/2.png", png(2)), ("dog/3.png", png(3))])
    nested = tar_bytes([("cat.tar", tar_bytes([("1.png", png(1))])), ("dog.tar", plain)])
    return [plain, nested]


def _make_packed_tars() -> list[bytes]:
    members = [("cat/1.png", png(1)), ("dog/2.png", png(2))]
    return [tar_bytes(members, mode=f"w:{mode}") for mode in ("gz", "bz2", "xz")]


def _make_zips() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", method) as archive:
            for number in range(3):
                with archive.open(f"cat/{number}.png", "w", force_zip64=number == 1) as member:
                    member.write(png(number))
        found.append(sink.getvalue())
    # As of a file of more than 4 GiB: the numbers stand in the zip64 records.
    with tempfile.TemporaryDirectory() as folder:
        found.append(write_zip(Path(folder) / "x", [("cat", png(1)), ("dog", png(2))]).read_bytes())
    return found


def _make_image_tables() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        images = [("1", png(1)), ("2", png(2)), ("3", png(3))]
        plain = write_parquet(Path(folder) / "x", images).read_bytes()
    rows = [{"bytes": png(4), "path": "a/x.png"}, {"bytes": png(5), "path": None}]
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": rows, "label": [0, 1], "id": ["a", "b"]})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), sink)
    return [plain, sink.getvalue()]


# Images.


def _make_images() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    found = []
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, mode, options in (
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("PNG", "RGB", {"exif": exif}),
        ("PNG", "P", {"transparency": 1}),
        ("PNG", "I;16", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {"exif": exif}),
        ("WEBP", "RGBA", {"lossless": True}),
    ):
        sink = io.BytesIO()
        made = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        made.save(sink, kind, **options)
        found.append(sink.getvalue())
    return found


def _read_image(data: bytes, folder: Path) -> None:
    with_error: list[DataError] = []
    for read in (read_size, _read_jpeg, decode_image):
        try:
            read(data, name="x")
        except DataError as error:
            with_error.append(error)
    if with_error:
        raise with_error[0]


def _read_jpeg(data: bytes, *, name: str) -> None:
    header = read_jpeg_header(data, name=name)
    if header is not None:
        decode_jpeg(data, header)
        decode_jpeg(data, header, reduction=4)


def _tensor_bytes() -> list[bytes]:
    return [safetensors.torch.save(_tensors(), {"fingerprint": _FINGERPRINT})]


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


_JSON = json_mutator()
_ANY_IMAGE_TAR = splice([mutate_tar, mutate_tar, mutate_bytes])

TARGETS: tuple[Target, ...] = (
    Target("index", _make_indices, splice([_mutate_index] * 4 + [_JSON]), _read_index),
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
    Target("plan", lambda: [_plan_files()["plan.json"]], _JSON, _read_plan),
    Target(
        "rows of a plan",
        lambda: [_plan_files()["plan.parquet"]],
        mutate_parquet,
        _read_plan_rows,
    ),
    Target("published shard", lambda: [_published_table()], mutate_parquet, _read_published_shard),
    Target("stage record", _make_stage_record, _JSON, _read_stage_record),
    Target("features", _make_features, mutate_parquet, _read_features),
    Target("codes", _make_codes, mutate_parquet, _read_codes),
    Target("tensor file", _tensor_bytes, mutate_safetensors, _read_tensor_file),
    Target("commit", lambda: [_run_files()[_commit_name()]], _JSON, _read_commit),
    Target("manifest", lambda: [_manifest()], _JSON, _read_manifest),
    Target(
        "checkpoint tensors",
        lambda: [_run_files()[_weights_file()]],
        mutate_safetensors,
        _read_checkpoint_tensors,
    ),
    Target("rank report", _make_rank_report, _JSON, _read_rank_report),
    Target("weights", _tensor_bytes, mutate_safetensors, _read_weights),
    Target("torch weights", lambda: _make_torch_files(_tensors()), _mutate_torch, _read_torch_file),
    Target("published weights", _make_published, _mutate_torch, _read_published_weights),
    Target("moments", _make_moments, mutate_safetensors, lambda data, _: Moments.from_bytes(data)),
    Target(
        "reference statistics",
        _make_reference,
        _mutate_reference,
        lambda data, _: ReferenceStatistics.from_bytes(data),
    ),
    Target("ADM statistics", _make_adm, archive_mutator({".npy": mutate_npy}), _read_adm),
    Target("config", lambda: [_TINY_CONFIG.read_bytes()], mutate_yaml, _read_config),
    Target("overrides", _make_overrides, mutate_text, _read_overrides),
    Target(
        "YAML",
        lambda: [_TINY_CONFIG.read_bytes()],
        mutate_yaml,
        _read_yaml_text,
        documented=(ValueError,),
    ),
    *(
        Target(
            f"{ending} list",
            functools.partial(lambda text: [text.encode()], text),
            mutate_json_lines if ending == "jsonl" else mutate_text,
            _list_reader(ending),
        )
        for ending, text in _LISTS.items()
    ),
    *(
        Target(
            f"source of a {ending} list",
            functools.partial(lambda text: [text.encode()], text),
            mutate_json_lines if ending == "jsonl" else mutate_text,
            _list_source_reader(ending),
        )
        for ending, text in _LISTS.items()
    ),
    Target("classes", _make_class_files, mutate_text, _class_file_reader(read_classes)),
    Target("class map", _make_class_files, mutate_text, _class_file_reader(read_class_map)),
    Target(
        "metrics",
        _make_metrics,
        mutate_json_lines,
        lambda data, _: parse_records(data, name="x", kind="metrics"),
    ),
    Target("foreign shard", lambda: [_shard_tar()], _ANY_IMAGE_TAR, _read_foreign_shard),
    Target(
        "shard as a source",
        lambda: [_shard_tar()],
        _ANY_IMAGE_TAR,
        _source_reader("a.tar", format="webdataset"),
    ),
    Target("tar", _make_image_tar, _ANY_IMAGE_TAR, _source_reader("a.tar")),
    Target("packed tar", _make_packed_tars, mutate_bytes, _source_reader("a.tar.gz")),
    Target("zip", _make_zips, mutate_zip, _source_reader("a.zip")),
    Target("parquet table", _make_image_tables, mutate_parquet, _source_reader("a.parquet")),
    # 4 bytes for each pixel that may be, of two copies where a palette has a transparency.
    Target("image", _make_images, mutate_image, _read_image, max_bytes=2**30),
)
"""What `test_fuzzing` and `fuzzing.py` feed."""
