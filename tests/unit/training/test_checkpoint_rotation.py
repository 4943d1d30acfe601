from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import Attempt, CheckpointStore
from fqgan_dist.training.config import RetentionPolicy

PREFIX = "checkpoints"


def _store(root: Path, **policy: Any) -> CheckpointStore:
    retention = RetentionPolicy(**policy) if policy else None
    return CheckpointStore(Storage(root), PREFIX, retention=retention)


def _save(attempt: Attempt, step: int, rfid: float | None = None) -> None:
    attempt.save(
        step,
        tensors={"weights": {"x": torch.full((4,), float(step))}},
        state={},
        metrics={} if rfid is None else {"rfid": rfid},
        config={},
        dataset_id="d",
    )


def _save_all(store: CheckpointStore, scores: dict[int, float | None]) -> None:
    with store.begin_attempt() as attempt:
        for step, score in scores.items():
            _save(attempt, step, score)


def _steps_on_disk(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (root / PREFIX).glob("step-*"))


NO_SCORES: dict[int, float | None] = dict.fromkeys(range(1, 9))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 1}, [8]),
        ({"keep_last": 3}, [6, 7, 8]),
        ({"keep_last": 100}, list(range(1, 9))),
        ({"keep_last": 1, "keep_every": 3}, [3, 6, 8]),
        ({"keep_last": 2, "keep_every": 4}, [4, 7, 8]),
    ],
)
def test_the_last_and_every_kth_are_kept(
    policy: dict[str, Any], kept: list[int], tmp_path: Path
) -> None:
    store = _store(tmp_path, **policy)
    _save_all(store, NO_SCORES)
    assert [commit.step for commit in store.list_commits()] == kept
    assert _steps_on_disk(tmp_path) == kept
    assert store.verify() == []


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 5]), ("max", [3, 5])])
def test_the_best_is_kept(mode: str, kept: list[int], tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=1, best_metric="rfid", best_mode=mode)
    _save_all(store, {1: 5.0, 2: 1.0, 3: 9.0, 4: None, 5: 4.0})
    assert [commit.step for commit in store.list_commits()] == kept
    assert _steps_on_disk(tmp_path) == kept


def test_a_damaged_checkpoint_counts_for_nothing_and_is_left_alone(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=2)
    with store.begin_attempt() as attempt:
        _save(attempt, 1)
        _save(attempt, 2)
        attempt.wait()
        (manifest,) = (tmp_path / PREFIX).glob("step-00000002/*/manifest.json")
        manifest.write_bytes(b"{}")
        _save(attempt, 3)
    # Without the exception for damage, 2 and 3 would stay and nothing good beside the newest.
    assert _steps_on_disk(tmp_path) == [1, 2, 3]


def test_files_of_a_killed_older_attempt_are_deleted(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=2)
    killed = store.begin_attempt()
    killed.close()
    left = tmp_path / PREFIX / f"step-00000009/attempt-{killed.id}/weights.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"partial")
    _save_all(store, {1: None})
    assert _steps_on_disk(tmp_path) == [1]


def test_files_of_a_newer_or_unknown_attempt_are_left_alone(tmp_path: Path) -> None:
    store = _store(tmp_path, keep_last=1)
    unknown = tmp_path / PREFIX / f"step-00000009/attempt-{'f' * 32}/weights.safetensors"
    with store.begin_attempt() as attempt:
        unknown.parent.mkdir(parents=True)
        unknown.write_bytes(b"being written")
        running = tmp_path / PREFIX / f"step-00000008/attempt-{attempt.id}/weights.rank-00001"
        running.parent.mkdir(parents=True)
        running.write_bytes(b"another rank is ahead")
        _save(attempt, 1)
        _save(attempt, 2)
    assert _steps_on_disk(tmp_path) == [2, 8, 9]


def test_a_folder_is_not_deleted_while_a_log_record_is_damaged(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save_all(store, {1: None, 2: None})
    (tmp_path / PREFIX / "commits/0000000003.json").write_bytes(b"damaged")
    _save_all(_store(tmp_path, keep_last=1), {3: None})
    assert _steps_on_disk(tmp_path) == [2, 3]


def test_a_deletion_that_was_cut_short_is_finished_later(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save_all(store, {1: None, 2: None, 3: None})
    saved = {path: path.read_bytes() for path in (tmp_path / PREFIX).glob("step-00000001/*/*")}
    store.prune(RetentionPolicy(keep_last=1))
    for path, data in saved.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert store.prune(RetentionPolicy(keep_last=1)) == []
    assert _steps_on_disk(tmp_path) == [3]


def test_a_pruned_checkpoint_is_not_loaded_even_if_its_files_are_there(tmp_path: Path) -> None:
    store = _store(tmp_path)
    _save_all(store, {1: None, 2: None})
    saved = {path: path.read_bytes() for path in (tmp_path / PREFIX).glob("step-00000001/*/*")}
    store.prune(RetentionPolicy(keep_last=1))
    for path, data in saved.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match="no good checkpoint of step 1"):
        store.load_latest(step=1)


def test_pruning_by_hand_does_not_disturb_the_running_attempt(tmp_path: Path) -> None:
    store = _store(tmp_path)
    with store.begin_attempt() as attempt:
        for step in (1, 2, 3):
            _save(attempt, step)
        attempt.wait()
        removed = _store(tmp_path).prune(RetentionPolicy(keep_last=1))
        _save(attempt, 4)
    assert [commit.step for commit in removed] == [1, 2]
    assert [commit.step for commit in store.list_commits()] == [3, 4]
    assert _steps_on_disk(tmp_path) == [3, 4]
