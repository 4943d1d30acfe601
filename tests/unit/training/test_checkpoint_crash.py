from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.faulty_storage import Fault, FaultyStorage, Mode
from torch import Tensor

from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import Attempt, CheckpointStore
from fqgan_dist.training.config import RetentionPolicy

PREFIX = "checkpoints"
STEPS = range(1, 5)


def _content(step: int) -> dict[str, dict[str, Tensor]]:
    return {
        "weights": {"x": torch.full((16,), float(step)), "n": torch.tensor(step)},
        "optimizer": {"x.exp_avg": torch.full((16,), step + 0.5, dtype=torch.bfloat16)},
        "ema": {"x": torch.full((16,), -float(step))},
    }


def _save(attempt: Attempt, step: int) -> None:
    attempt.save(
        step,
        tensors=_content(step),
        state={"images_seen": step * 8},
        metrics={"rfid": float(step)},
        config={},
        dataset_id="d",
    )


def _store(storage: Storage) -> CheckpointStore:
    return CheckpointStore(storage, PREFIX, retention=RetentionPolicy(keep_last=2, keep_every=3))


def _train(storage: Storage) -> int:
    """Save all steps; return the last step whose commit was confirmed before a failure."""
    confirmed = 0
    try:
        with _store(storage).begin_attempt() as attempt:
            for step in STEPS:
                _save(attempt, step)
                attempt.wait()
                confirmed = step
    except DataError as error:
        assert "injected failure" in str(error)  # noqa: PT017  the storage has no other failure
    return confirmed


def _count_operations(root: Path) -> int:
    fault = Fault(None)
    assert _train(FaultyStorage(root, fault)) == STEPS[-1]
    return fault.count


def _check_loads(store: CheckpointStore, confirmed: int) -> int:
    """Check the newest checkpoint: whole, of one step, and not older than what was confirmed."""
    loaded = store.load_latest()
    if loaded is None:
        assert confirmed == 0
        return 0
    assert confirmed <= loaded.step <= confirmed + 1
    assert loaded.manifest.state == {"images_seen": loaded.step * 8}
    for part, tensors in _content(loaded.step).items():
        read = loaded.read(part)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    return loaded.step


@pytest.mark.full("every operation; those of a whole run are tried in test_crash_points")
@pytest.mark.parametrize("mode", ["before", "after", "once"])
def test_a_crash_at_any_storage_operation_loses_nothing_confirmed(
    mode: Mode, tmp_path: Path
) -> None:
    num_operations = _count_operations(tmp_path / "whole")
    assert num_operations > 50
    unconfirmed = 0
    for operation in range(1, num_operations + 1):
        root = tmp_path / f"crash-{operation}"
        confirmed = _train(FaultyStorage(root, Fault(operation, mode)))
        store = _store(Storage(root))
        step = _check_loads(store, confirmed)
        unconfirmed += step > confirmed
        assert store.verify() == []
        # The next attempt goes on, and leaves no file of the crashed one behind.
        with store.begin_attempt() as attempt:
            for later in (step + 1, step + 2):
                _save(attempt, later)
        assert _check_loads(store, step + 2) == step + 2
        live = {(commit.step, commit.attempt) for commit in store.list_commits()}
        on_disk = {
            (int(path.parent.name[5:]), path.name.removeprefix("attempt-"))
            for path in (root / PREFIX).glob("step-*/attempt-*")
        }
        assert on_disk == live
    # The commit is a single operation, so failures behind it must have been among the cases.
    assert unconfirmed > 0


WRITER = """
import sys, torch
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.config import RetentionPolicy
store = CheckpointStore(Storage(sys.argv[1]), "checkpoints", retention=RetentionPolicy(keep_last=2))
attempt = store.begin_attempt()
loaded = store.load_latest()
step = loaded.step if loaded else 0
while True:
    step += 1
    tensors = {f"t{i}": torch.full((50_000,), float(step)) for i in range(4)}
    attempt.save(step, tensors={"weights": tensors, "ema": tensors},
                 state={"step": step}, metrics={}, config={}, dataset_id="d")
    attempt.wait()
    print(step, flush=True)
"""


def test_sigkill_in_the_middle_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    confirmed = 0
    for num_lines in (1, 6, 13):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout as lines:
            first = int(next(lines))
            assert first > confirmed
            confirmed = first
            for _ in range(num_lines - 1):
                confirmed = int(next(lines))
            process.send_signal(signal.SIGKILL)
            # What it confirmed while the signal was on its way counts too.
            confirmed = max([confirmed, *(int(line) for line in lines if line.endswith("\n"))])
        assert process.wait() == -signal.SIGKILL
        store = CheckpointStore(Storage(tmp_path), "checkpoints")
        loaded: Any = store.load_latest()
        assert confirmed <= loaded.step <= confirmed + 1
        assert loaded.manifest.state == {"step": loaded.step}
        for part in ("weights", "ema"):
            tensors = loaded.read(part)
            assert len(tensors) == 4
            assert {value for t in tensors.values() for value in t.unique().tolist()} == {
                float(loaded.step)
            }
        assert store.verify() == []
