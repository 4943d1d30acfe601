from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.old_checkpoints import make_old
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import Attempt, CheckpointStore, LoadedCheckpoint
from fqgan_dist.training.commit_log import CommitLog, CommitRecord, canonical_json, sha256_hex
from fqgan_dist.training.config import RetentionPolicy

PREFIX = "tokenizer/checkpoints"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage(tmp_path), PREFIX)


def _content(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights": {
            "layer.weight": torch.randn(4, 3, generator=generator),
            "layer.bias": torch.randn(4, generator=generator).to(torch.bfloat16),
        },
        "optimizer": {"layer.weight.step": torch.tensor(step), "rng": torch.tensor([step, -1])},
    }


def _save(attempt: Attempt, step: int, **changes: Any) -> None:
    values = {
        "tensors": _content(step),
        "state": {"images_seen": step * 256, "nested": {"list": [1, 0.1, None, "x"]}},
        "metrics": {"rfid": 10.0 / (step + 1)},
        "config": {"width": 4},
        "dataset_id": "d" * 64,
    }
    attempt.save(step, **(values | changes))


def _save_all(store: CheckpointStore, *steps: int) -> None:
    with store.begin_attempt() as attempt:
        for step in steps:
            _save(attempt, step)


def _is_step(loaded: Any, step: int) -> bool:
    return loaded.step == step and all(
        torch.equal(loaded.read(part)[name], tensor)
        for part, tensors in _content(step).items()
        for name, tensor in tensors.items()
    )


def _file(root: Path, step: int, pattern: str) -> Path:
    (path,) = (root / PREFIX).glob(f"step-{step:08d}/*/{pattern}")
    return path


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_an_empty_store_has_nothing_to_load(store: CheckpointStore) -> None:
    assert store.load_latest() is None
    assert store.list_commits() == []
    assert store.verify() == []


def test_all_that_was_saved_loads_in_another_process_view(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 3, 7)
    loaded = CheckpointStore(Storage(tmp_path), PREFIX).load_latest()
    assert loaded is not None
    assert _is_step(loaded, 7)
    assert loaded.manifest.state == {"images_seen": 1792, "nested": {"list": [1, 0.1, None, "x"]}}
    assert loaded.manifest.metrics == {"rfid": 1.25}
    assert loaded.manifest.config == {"width": 4}
    assert loaded.manifest.dataset_id == "d" * 64
    assert loaded.manifest.parts == ["optimizer", "weights"]
    assert loaded.tensor_shapes("weights") == {"layer.weight": (4, 3), "layer.bias": (4,)}
    manifest = _file(tmp_path, 7, "manifest.json").read_bytes()
    assert loaded.commit.manifest_sha256 == hashlib.sha256(manifest).hexdigest()


def test_commits_name_their_parents(store: CheckpointStore) -> None:
    _save_all(store, 1, 2)
    newest = store.load_latest()
    assert newest is not None
    with store.begin_attempt() as attempt:
        attempt.continue_from(newest.number)
        _save(attempt, 3)
    parents = [(commit.number, commit.parent) for commit in store.list_commits()]
    assert parents == [(2, None), (3, 2), (5, 3)]


def test_an_older_step_loads_by_its_step(store: CheckpointStore) -> None:
    _save_all(store, 1, 2, 3)
    loaded = store.load_latest(step=2)
    assert _is_step(loaded, 2)


def test_checkpoints_without_hashes_of_blocks_load_and_training_goes_on_from_them(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    make_old(tmp_path / PREFIX)
    manifest = json.loads(_file(tmp_path, 2, "manifest.json").read_bytes())
    assert manifest["format"] == 1
    assert "blocks" not in manifest["files"][0]
    old = CheckpointStore(Storage(tmp_path), PREFIX)
    assert _is_step(old.load_latest(), 2)
    assert old.verify() == []
    _save_all(old, 3)
    assert [old.load(commit.number).manifest.format for commit in old.list_commits()] == [1, 1, 2]
    _flip(_file(tmp_path, 3, "optimizer.*"), -1)
    _flip(_file(tmp_path, 2, "weights.*"), -1)
    assert _is_step(old.load_latest(), 1)
    assert len(old.verify()) == 2


def test_only_what_is_read_decides_whether_a_checkpoint_is_good(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    _flip(_file(tmp_path, 2, "optimizer.*"), -1)
    found = store.read_newest(lambda loaded: (loaded.step, loaded.read("weights")))
    assert found is not None
    assert found[0] == 2
    found = store.read_newest(lambda loaded: (loaded.step, loaded.read_parts({"weights": {}})))
    assert found is not None
    assert found[0] == 1


def test_an_error_that_is_no_damage_is_not_stepped_over(store: CheckpointStore) -> None:
    _save_all(store, 1, 2)
    steps: list[int] = []

    def read(loaded: LoadedCheckpoint) -> object:
        steps.append(loaded.step)
        return loaded.read_parts({"ema": {}})

    with pytest.raises(CheckpointError, match="no part 'ema'"):
        store.read_newest(read)
    assert steps == [2]


def test_the_newest_commit_wins_also_with_a_lower_step(store: CheckpointStore) -> None:
    _save_all(store, 10, 20)
    _save_all(store, 11)
    assert _is_step(store.load_latest(), 11)


def test_a_rank_opens_the_commit_that_rank_0_names(store: CheckpointStore) -> None:
    _save_all(store, 1, 2)
    number = store.list_commits()[0].number
    assert _is_step(store.load(number), 1)
    with pytest.raises(CheckpointError, match="is a start, not a commit"):
        store.load(1)
    with pytest.raises(CheckpointError, match="no commit 99"):
        store.load(99)


def test_a_step_that_was_never_saved_is_an_error(store: CheckpointStore) -> None:
    _save_all(store, 1, 2)
    with pytest.raises(CheckpointError, match=r"no good checkpoint of step 5; .*committed: 1, 2"):
        store.load_latest(step=5)
    assert store.verify(step=5)


def test_single_tensors_can_be_read(store: CheckpointStore) -> None:
    _save_all(store, 4)
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.read("weights", ["layer.bias"]).keys() == {"layer.bias"}
    with pytest.raises(CheckpointError, match=r"has no tensors \['other'\]"):
        loaded.read("weights", ["other"])
    with pytest.raises(CheckpointError, match=r"no part 'ema'; it has optimizer, weights"):
        loaded.read("ema")


@pytest.mark.parametrize("pattern", ["weights.*", "optimizer.*", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_named_and_stepped_over(
    pattern: str,
    damage: str,
    store: CheckpointStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _save_all(store, 1, 2)
    path = _file(tmp_path, 2, pattern)
    match damage:
        case "flip":
            _flip(path, 20)
        case "truncate":
            _truncate(path)
        case _:
            path.unlink()
    assert store.verify(step=1) == []
    assert [problem for problem in store.verify() if path.name in problem]
    with caplog.at_level(logging.WARNING):
        loaded = store.load_latest()
    assert _is_step(loaded, 1)
    assert str(path) in caplog.text
    assert "stepping over the damaged checkpoint of step 2" in caplog.text


@pytest.mark.parametrize("position", range(0, 400, 23))
def test_a_flipped_bit_anywhere_in_a_part_is_never_loaded(
    position: int, store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    _flip(_file(tmp_path, 2, "weights.*"), position)
    assert _is_step(store.load_latest(), 1)


def test_a_damaged_commit_record_is_named_and_stepped_over(
    store: CheckpointStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save_all(store, 1, 2)
    path = tmp_path / PREFIX / "commits/0000000003.json"
    _flip(path, 50)
    fresh = CheckpointStore(Storage(tmp_path), PREFIX)
    with caplog.at_level(logging.WARNING):
        assert _is_step(fresh.load_latest(), 1)
    assert str(path) in caplog.text
    assert any(str(path) in problem for problem in fresh.verify())


@pytest.mark.parametrize("kind", ["brackets", "device", "pipe", "endless", "other", "NaN"])
def test_one_hostile_object_among_the_commits_is_named_and_stepped_over(
    store: CheckpointStore, tmp_path: Path, kind: str
) -> None:
    _save_all(store, 1, 2)
    path = tmp_path / PREFIX / "commits" / "0000000004.json"
    match kind:
        case "brackets":
            path.write_text("[" * 100_000)
        case "device":
            path.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(path)
        case "endless":
            path.write_bytes(b"{")
            os.truncate(path, 2**42)
        case "NaN":
            path.write_text('{"content": NaN, "sha256": 5}')
        case _:
            path.write_text('{"content": {"kind": "\\u001b[2J"}, "sha256": {}}')
    fresh = CheckpointStore(Storage(tmp_path), PREFIX)
    assert [commit.step for commit in fresh.list_commits()] == [1, 2]
    assert _is_step(fresh.load_latest(), 2)
    assert [str(path) in problem for problem in fresh.verify()] == [True]


def test_training_goes_on_after_a_damaged_commit_record(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    _truncate(tmp_path / PREFIX / "commits/0000000003.json")
    fresh = CheckpointStore(Storage(tmp_path), PREFIX)
    _save_all(fresh, 2, 3)
    assert _is_step(fresh.load_latest(), 3)


def test_damage_after_opening_is_found_when_reading(store: CheckpointStore, tmp_path: Path) -> None:
    _save_all(store, 1)
    loaded = store.load_latest()
    assert loaded is not None
    _flip(_file(tmp_path, 1, "weights.*"), -1)
    with pytest.raises(CheckpointError, match="sha256 is not the manifest's"):
        loaded.read("weights")
    assert loaded.read("optimizer")


def test_when_everything_is_damaged_training_does_not_start_over(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    for step in (1, 2):
        _flip(_file(tmp_path, step, "weights.*"), -1)
    with pytest.raises(CheckpointError, match=r"no good checkpoint; steps committed: 1, 2"):
        store.load_latest()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"holds 2 checkpoints .*restore commits/"),
        (lambda folder: (folder / "0000000002.json").unlink(), r"no log record 2 before it"),
        (lambda folder: (folder / "0000000001.json").unlink(), r"no log record 1 before it"),
        (
            lambda folder: (folder / "9999999999.json").write_text("{}"),
            r"9999999999.json: there is no log record 4 to 9999999998 .*remove the file",
        ),
    ],
    ids=["no log", "a gap", "no beginning", "a number at the end"],
)
def test_a_log_that_does_not_tell_is_an_error_and_no_start_from_zero(
    store: CheckpointStore,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    _save_all(store, 5, 6)
    damage(tmp_path / PREFIX / "commits")
    again = CheckpointStore(Storage(tmp_path), PREFIX)
    with pytest.raises(CheckpointError, match=message):
        again.begin_attempt()
    assert any(re.search(message, problem) for problem in again.verify())


@pytest.mark.parametrize("name", ["12345678901.json", "0000000004.json.bak", "notes", "1.json"])
def test_strangers_in_the_log_stop_nobody_and_are_named(
    store: CheckpointStore, tmp_path: Path, name: str
) -> None:
    _save_all(store, 5)
    (tmp_path / PREFIX / "commits" / name).write_text("{}")
    assert store.verify() == [f"{tmp_path}/{PREFIX}/commits/{name}: not a log record; remove it"]
    _save_all(store, 6)
    assert _is_step(store.load_latest(), 6)


def test_files_without_a_commit_are_no_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    _save_all(store, 1, 2)
    (tmp_path / PREFIX / "commits/0000000003.json").unlink()
    assert _is_step(CheckpointStore(Storage(tmp_path), PREFIX).load_latest(), 1)


def test_a_manifest_that_was_changed_and_reads_well_is_never_loaded(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    path = _file(tmp_path, 2, "manifest.json")
    manifest = json.loads(path.read_bytes())
    manifest["metrics"] = {"changed": 1.0}
    path.write_bytes(canonical_json(manifest))
    assert _is_step(store.load_latest(), 1)
    (problem,) = store.verify()
    assert "its sha256 is not the commit's" in problem


def test_a_manifest_of_another_checkpoint_is_refused(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1, 2)
    data = _file(tmp_path, 1, "manifest.json").read_bytes()
    _file(tmp_path, 2, "manifest.json").write_bytes(data)
    _recommit(tmp_path, data, step=2)
    assert any("another checkpoint" in problem for problem in store.verify(step=2))


def test_a_pickle_in_a_well_hashed_checkpoint_is_refused_and_does_not_run(
    store: CheckpointStore, tmp_path: Path
) -> None:
    _save_all(store, 1)
    witness = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    loaded = store.load_latest()
    assert loaded is not None
    make_old(tmp_path / PREFIX)
    loaded = CheckpointStore(Storage(tmp_path), PREFIX).load_latest()
    assert loaded is not None
    payload = pickle.dumps(Hostile())
    path = _file(tmp_path, 1, "weights.*")
    path.write_bytes(payload)
    files = [
        file.model_copy(update={"bytes": len(payload), "sha256": sha256_hex(payload)})
        if file.part == "weights"
        else file
        for file in loaded.manifest.files
    ]
    manifest = loaded.manifest.model_copy(update={"files": files})
    data = canonical_json(manifest.model_dump(mode="json"))
    _file(tmp_path, 1, "manifest.json").write_bytes(data)
    _recommit(tmp_path, data, step=1)
    hostile = CheckpointStore(Storage(tmp_path), PREFIX).load_latest()
    assert hostile is not None
    assert hostile.number > loaded.number
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        hostile.read("weights")
    assert not witness.exists()


def test_without_a_policy_all_stay_until_they_are_pruned_by_hand(
    store: CheckpointStore,
) -> None:
    _save_all(store, *range(1, 7))
    assert [commit.step for commit in store.list_commits()] == [1, 2, 3, 4, 5, 6]
    removed = store.prune(RetentionPolicy(keep_last=1))
    assert [commit.step for commit in removed] == [1, 2, 3, 4, 5]
    assert _is_step(store.load_latest(), 6)


def _recommit(root: Path, manifest: bytes, *, step: int) -> None:
    """Commit a manifest that was put in place by hand, as a hostile bucket could."""
    log = CommitLog(Storage(root).child(PREFIX))
    of_step = (log.read(number) for number in log.numbers())
    record = next(r for r in of_step if isinstance(r, CommitRecord) and r.step == step)
    number = log.numbers()[-1] + 1
    log.create(
        record.model_copy(update={"number": number, "manifest_sha256": sha256_hex(manifest)})
    )
