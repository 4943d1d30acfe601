"""A store that only the tests know serves all that reads or writes: nobody asks for schemes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support.datasets import build_photographs
from support.memory_store import MemoryBucket, open_memory_bucket

from data_tools.cli import main
from fqgan_dist.data.index import load_index
from fqgan_dist.diagnosis.storage import check_access, check_speed
from fqgan_dist.diagnosis.weights import check_file
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.stages.adm_reference import hash_adm_reference
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import save_safetensors
from fqgan_dist.weights.staging import resolve_weights


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> MemoryBucket:
    return open_memory_bucket(monkeypatch)


@pytest.fixture
def storage(bucket: MemoryBucket) -> Storage:
    return Storage(bucket.root)


def test_checkpoints_are_saved_and_loaded(storage: Storage) -> None:
    weights = {"layer.weight": torch.arange(12.0).reshape(3, 4)}
    store = CheckpointStore(storage, "tokenizer/checkpoints")
    with store.begin_attempt() as attempt:
        attempt.save(
            7,
            tensors={"weights": weights},
            state={"images_seen": 1},
            metrics={"rfid": 1.0},
            config={"width": 4},
            dataset_id="d" * 64,
        )
    loaded = CheckpointStore(storage, "tokenizer/checkpoints").load_latest()
    assert loaded is not None
    assert loaded.step == 7
    assert torch.equal(loaded.read("weights")["layer.weight"], weights["layer.weight"])
    assert store.verify() == []


def test_a_dataset_is_made_verified_and_read_as_a_source(storage: Storage) -> None:
    index = build_photographs(storage.child("data"))
    uri = storage.child("data").root
    assert load_index(storage.child("data")).dataset_id == index.dataset_id
    assert main(["verify", uri, "workers=1"]) == 0
    assert main(["stats", uri]) == 0
    with open_source(f"{uri}/shard-{{000000..000001}}.tar") as source:
        assert len(source) == sum(shard.count for shard in index.shards[:2])
    with (
        pytest.raises(ConfigError, match="is_shared: has no effect"),
        open_source(uri, is_shared=True),
    ):
        pass
    storage.write_bytes(f"data/{index.shards[0].file}", b"damaged")
    assert main(["verify", uri, "workers=1"]) == 3


def test_files_of_weights_are_found(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = save_safetensors(tmp_path / "x", {"weight": torch.zeros(2)})
    storage.write_file("a/x.safetensors", tmp_path / "x")
    uri = storage.uri("a/x.safetensors")
    path = resolve_weights(WeightsConfig(source=uri), field="weights")
    assert path is not None
    assert path.read_bytes() == (tmp_path / "x").read_bytes()
    assert hash_adm_reference(uri) == sha256
    assert check_file("weights", uri, sha256).status == "ok"


def test_the_doctor_examines_it(bucket: MemoryBucket) -> None:
    for verdict in (check_access(bucket.root), check_speed(bucket.root)):
        assert verdict.status == "ok", verdict
    bucket.is_refusing = True
    assert "access is refused" in check_access(bucket.root).finding


def test_logs_are_published_to_it(bucket: MemoryBucket) -> None:
    handler = open_log_file(Storage(bucket.root), "driver", interval_s=1000)
    handler.emit(logging.makeLogRecord({"msg": "kept"}))
    handler.close()
    ((name, text),) = bucket.objects.items()
    assert name.startswith("logs/driver-")
    assert text == b"kept\n"


def test_the_scheme_goes_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown scheme; expected a path or s3://bucket/\w+$"):
        Storage("memory://bucket")
    root = open_memory_bucket(monkeypatch).root
    assert Storage(root).root == root
    with pytest.raises(ConfigError, match=r"credentials or a port.*with none at all$"):
        Storage("memory://user@bucket")
