"""Who reads a checkpoint while others are given up, on a disk and in a bucket."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from support.small_s3 import run_small_s3, set_credentials
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training import checkpoint_rotation
from fqgan_dist.training.checkpoint import CheckpointStore, LoadedCheckpoint
from fqgan_dist.training.config import RetentionPolicy

PREFIX = "tokenizer/checkpoints"
NEWEST = RetentionPolicy(keep_last=1)


@pytest.fixture(params=["disk", "S3"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path)
        return
    with run_small_s3() as server:
        set_credentials(monkeypatch, server.endpoint)
        yield "s3://bucket/run"


def _store(root: str, retention: RetentionPolicy | None = None) -> CheckpointStore:
    return CheckpointStore(Storage(root), PREFIX, retention=retention)


def _weights(step: int) -> dict[str, Tensor]:
    return {f"{name}": torch.full((1000,), float(step)) for name in "abc"}


def _save_all(store: CheckpointStore, *steps: int) -> None:
    with store.begin_attempt() as attempt:
        for step in steps:
            tensors = {"weights": _weights(step)}
            attempt.save(step, tensors=tensors, state={}, metrics={}, config={}, dataset_id="d")


def test_a_reader_whose_checkpoint_is_given_up_meanwhile_takes_the_newest(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save_all(_store(root), 1)
    steps: list[int] = []

    def read(loaded: LoadedCheckpoint) -> dict[str, Tensor]:
        steps.append(loaded.step)
        if loaded.step < 3:  # rotation is faster than the reader
            _save_all(_store(root, NEWEST), loaded.step + 1)
        return loaded.read("weights")

    with caplog.at_level(logging.INFO):
        found = _store(root).read_newest(read)
    assert found is not None
    assert torch.equal(found["a"], _weights(3)["a"])
    assert steps == [1, 2, 3]
    assert "the checkpoint of step 1 was given up while it was read" in caplog.text
    assert "damaged" not in caplog.text


def test_readers_beside_a_writer_that_keeps_one_read_whole_checkpoints(
    root: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save_all(_store(root), 1)
    is_over = threading.Event()

    def write() -> None:
        try:
            for start in range(2, 8, 3):
                _save_all(_store(root, NEWEST), *range(start, start + 3))
        finally:
            is_over.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [0]
    try:
        while not is_over.is_set():
            found = _store(root).read_newest(lambda loaded: loaded.read("weights"))
            assert found is not None
            values = {value for tensor in found.values() for value in tensor.unique().tolist()}
            assert len(values) == 1
            assert seen[-1] <= values.copy().pop()
            seen.append(values.pop())
            assert _store(root).verify() == []
    finally:
        writer.join()
    assert "damaged" not in caplog.text


def test_a_step_that_is_given_up_while_it_is_read_is_said_to_be_gone(tmp_path: Path) -> None:
    root = str(tmp_path)
    _save_all(_store(root), 1, 2)

    def read(loaded: LoadedCheckpoint) -> dict[str, Tensor]:
        _store(root).prune(NEWEST)
        return loaded.read("weights")

    with pytest.raises(CheckpointError, match=r"no good checkpoint of step 1; .*: 2; .*given up"):
        _store(root).read_newest(read, step=1)


def test_verification_beside_a_training_finds_no_damage_in_what_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    _save_all(_store(root), 1, 2, 3)
    find = LoadedCheckpoint.find_damage

    def find_late(loaded: LoadedCheckpoint) -> list[str]:
        _store(root).prune(NEWEST)
        return find(loaded)

    monkeypatch.setattr(LoadedCheckpoint, "find_damage", find_late)
    assert _store(root).verify() == []
    storage = Storage(root).child(PREFIX)
    (name,) = [
        name
        for name, _ in storage.walk()
        if name.startswith("step-00000003/") and "weights" in name
    ]
    storage.delete(name)
    assert len(_store(root).verify()) == 1


def test_in_the_time_of_grace_a_reader_ends_what_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    patient = RetentionPolicy(keep_last=1, grace_s=600)
    _save_all(_store(root), 1, 2)

    def read(loaded: LoadedCheckpoint) -> dict[str, Tensor]:
        _store(root).prune(patient)
        return loaded.read("weights")

    found = _store(root).read_newest(read, step=1)
    assert found is not None
    assert torch.equal(found["b"], _weights(1)["b"])
    # Nobody begins to read it now.
    with pytest.raises(CheckpointError, match="no good checkpoint of step 1"):
        _store(root).load_latest(step=1)
    _store(root).prune(patient)
    assert len(Storage(root).list(f"{PREFIX}")) == 3  # the log and both steps

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # noqa: ARG003
            return datetime.now(UTC) + timedelta(seconds=601)

    monkeypatch.setattr(checkpoint_rotation, "datetime", Later)
    _store(root).prune(patient)
    assert Storage(root).list(PREFIX) == ["commits", "step-00000002"]
