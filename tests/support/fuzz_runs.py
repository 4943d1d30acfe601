"""Files of runs for fuzzing: records of stages, checkpoints, weights, settings."""

from __future__ import annotations

import argparse
import functools
import io
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from support.byte_mutations import (
    json_mutator,
    mutate_bytes,
    mutate_json_lines,
    mutate_text,
    mutate_yaml,
)
from support.file_mutations import (
    archive_mutator,
    mutate_npy,
    mutate_pickle,
    mutate_safetensors,
)
from support.fuzz_files import (
    JSON,
    collect_files,
    make_tensor_file,
    make_tensors,
    sha256_of,
    spread_files,
)
from support.fuzzing import Target

from fqgan_dist.config import load_config
from fqgan_dist.diagnosis.weights import check_file
from fqgan_dist.evaluation.moments import Moments, load_adm_statistics
from fqgan_dist.evaluation.reference import ReferenceStatistics
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
from fqgan_dist.tokenizer.published import read_published_file
from fqgan_dist.training.checkpoint import CheckpointStore, Fragment
from fqgan_dist.training.checkpoint_attempt import Attempt
from fqgan_dist.training.checkpoint_format import RankReport, checkpoint_folder, hash_blocks
from fqgan_dist.training.commit_log import CommitRecord, canonical_json, seal, sha256_hex
from fqgan_dist.training.config import RetentionPolicy
from fqgan_dist.training.writer_process import WriterHere
from fqgan_dist.weights.files import load_safetensors_checked, load_torch_checked
from fqgan_dist.weights.tensors import hash_tensors, load_into
from fqgan_dist.yaml_text import parse_yaml

_TINY_CONFIG = Path(__file__).parent / "tiny.yaml"
_ATTEMPT = "a" * 32


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
    record = load_record(spread_files(folder, {"a.json": data}), "a.json")
    assert record is not None, "it was written"
    inputs = {"upstream.shards": "d" * 64, "training.steps": 8, "model.lr": 0.5, "x": [1, None]}
    has_inputs(record, inputs)
    check_inputs(record, inputs, source="a", growing=["training.steps"])


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
        return collect_files(folder)


def _commit_name() -> str:
    return max(name for name in _run_files() if name.startswith("t/commits/"))


def _commit() -> CommitRecord:
    return CommitRecord.model_validate(json.loads(_run_files()[_commit_name()])["content"])


def _use_checkpoints(folder: Path, files: dict[str, bytes]) -> None:
    store = CheckpointStore(spread_files(folder, _run_files() | files), "t")
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


def _neighbour(name: str) -> str:
    return f"{_weights_file().rpartition('/')[0]}/{name}"


def _read_checkpoint_tensors(data: bytes, folder: Path) -> None:
    # As of either format, by chance: 1 takes from the file what is in it.
    is_old = sum(data) % 2 == 1
    manifest = json.loads(_manifest()) | {"format": 1 if is_old else 2}
    name = _weights_file()
    for file in manifest["files"]:
        content = data if name.endswith(file["file"]) else _run_files()[_neighbour(file["file"])]
        blocks = hash_blocks(content, 64)
        digest = sha256_of(content) if is_old else blocks.root()
        file["bytes"], file["sha256"] = max(1, len(content)), digest
        file["blocks"] = None if is_old else blocks.model_dump()
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
    storage = spread_files(folder, {path: _reseal(data)})
    attempt = Attempt(
        storage,
        attempt_id=_ATTEMPT,
        rank=0,
        world_size=2,
        log=None,
        rotate=lambda _: None,
        rank_timeout_s=5,
        writer=WriterHere(),
    )
    attempt._read_report(checkpoint_folder(4, _ATTEMPT), 1)


# Weights.


def _read_weights(data: bytes, folder: Path) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    check_file("weights", str(path), None)
    tensors = load_safetensors_checked(path, sha256_of(data))
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
    return _make_torch_files({"ema": make_tensors(), "args": argparse.Namespace(a=1), "steps": 3})


def _mutate_torch(data: bytes, random: Random) -> bytes:
    if data.startswith(b"PK"):
        return archive_mutator({"data.pkl": mutate_pickle, "": mutate_bytes})(data, random)
    return mutate_pickle(data, random)


def _read_torch_file(data: bytes, folder: Path) -> None:
    path = folder / "x.pth"
    path.write_bytes(data)
    hash_tensors(load_torch_checked(path, sha256_of(data)))


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


# Settings and metrics.


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


def _make_metrics() -> list[bytes]:
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "x": [1]}]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


TARGETS: tuple[Target, ...] = (
    Target("stage record", _make_stage_record, JSON, _read_stage_record),
    Target("commit", lambda: [_run_files()[_commit_name()]], JSON, _read_commit),
    Target("manifest", lambda: [_manifest()], JSON, _read_manifest),
    Target(
        "checkpoint tensors",
        lambda: [_run_files()[_weights_file()]],
        mutate_safetensors,
        _read_checkpoint_tensors,
    ),
    Target("rank report", _make_rank_report, JSON, _read_rank_report),
    Target("weights", make_tensor_file, mutate_safetensors, _read_weights),
    Target(
        "torch weights", lambda: _make_torch_files(make_tensors()), _mutate_torch, _read_torch_file
    ),
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
    Target(
        "metrics",
        _make_metrics,
        mutate_json_lines,
        lambda data, _: parse_records(data, name="x", kind="metrics"),
    ),
)
