"""Damage of each kind of file of a run: it is named, an older step is used, and training goes on.

Not of `metrics.jsonl` and `damaged_samples.jsonl`: see telemetry.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.crash_runs import STAGE, open_store, read_state, run_session
from support.faulty_storage import Fault, FaultyStorage
from support.tiny_tasks import TINY_CONFIG

from fqgan_dist.cli import main
from fqgan_dist.errors import DataError, FqganError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore

FOLDER = f"{STAGE}/checkpoints"


def flip(path: Path) -> None:
    """Change a byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose(path: Path) -> None:
    """Lose all."""
    path.unlink()


DAMAGES: list[Callable[[Path], None]] = [flip, cut, lose]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, `calm`, and one that was killed after its second checkpoint, of step 4 of 5."""
    folder = tmp_path_factory.mktemp("runs")
    fault = Fault(None)
    run_session(FaultyStorage(folder / "calm", fault))
    for operation in reversed(range(fault.count)):
        attempt = folder / f"{operation}"
        with pytest.raises(FqganError):
            run_session(FaultyStorage(attempt, Fault(operation, "before")))
        if [commit.step for commit in open_store(Storage(attempt)).list_commits()] == [2, 4]:
            attempt.rename(folder / "killed")
            return folder
    raise AssertionError("no operation is between the second and the third checkpoint")


@pytest.fixture
def root(runs: Path, tmp_path: Path) -> Path:
    """The run that was killed."""
    return shutil.copytree(runs / "killed", tmp_path / "run")


def summary_of(root: Path) -> bytes:
    return (root / "summary.json").read_bytes()


def newest(root: Path, pattern: str) -> Path:
    (path,) = (root / FOLDER / "step-00000004").glob(f"attempt-*/{pattern}")
    return path


@pytest.mark.full("each kind of file and damage; each kind is tried in the test of `verify`")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["toy.rank*", "toy_optimizer.rank*", "manifest.json", "commit"])
def test_training_goes_on_from_the_checkpoint_before(
    runs: Path,
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    damage: Callable[[Path], None],
) -> None:
    store, storage = open_store(Storage(root)), Storage(root)
    number = store.list_commits()[-1].number
    is_of_log = pattern == "commit"
    path = root / FOLDER / f"commits/{number:010d}.json" if is_of_log else newest(root, pattern)
    damage(path)
    problems = open_store(storage).verify()
    if is_of_log and damage is lose:
        assert problems == []  # the end of the log: not to be told from a commit that never was
    else:
        assert [problem for problem in problems if str(path) in problem]
    with caplog.at_level(logging.WARNING):
        run_session(storage)
    if not (is_of_log and damage is lose):
        assert str(path) in caplog.text
    loaded = open_store(storage).load_latest()
    assert loaded is not None
    assert loaded.step == 5
    calm = read_state(Storage(runs / "calm"), tmp_path / "events")
    assert loaded.read("toy")["weight"].tolist() == calm.weight
    assert summary_of(root) == summary_of(runs / "calm")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["events", "summary"])
def test_files_that_nobody_reads_are_written_again(
    runs: Path, root: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    if kind == "events":
        for path in (root / STAGE / "tensorboard").iterdir():
            damage(path)
    else:
        (root / "summary.json").write_bytes(b"{half of a summary")
        damage(root / "summary.json")
    run_session(Storage(root))
    assert summary_of(root) == summary_of(runs / "calm")
    loaded = open_store(Storage(root)).load_latest()
    assert loaded is not None
    assert loaded.step == 5


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_record_of_a_stage_is_named(root: Path, damage: Callable[[Path], None]) -> None:
    path = root / "manifests" / "toy.json"
    path.write_bytes(path.read_bytes().replace(b'"x"', b'"x'))
    damage(path)
    with pytest.raises(DataError, match=rf"{path}: not a stage record"):
        run_session(Storage(root))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "pattern", ["x.rank-00000*", "x.rank-00001*", "rank-00001.json", "manifest.json", "commit"]
)
def test_verify_exits_with_3_for_each_kind_of_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
    damage: Callable[[Path], None],
) -> None:
    store = CheckpointStore(Storage(tmp_path), "tokenizer/checkpoints")
    with store.begin_attempt(world_size=2) as attempt:
        for step in (1, 2):
            with store.join_attempt(attempt.id, rank=1, world_size=2) as other:
                for rank, each in enumerate((attempt, other)):
                    each.save(
                        step,
                        tensors={"x": {f"{rank}": torch.ones(3)}},
                        state={},
                        metrics={},
                        config={},
                        dataset_id="d",
                    )
            attempt.wait()
    arguments = ["checkpoints", "verify", str(TINY_CONFIG), "tokenizer", f"storage.root={tmp_path}"]
    assert main(arguments) == 0
    folder = tmp_path / "tokenizer" / "checkpoints"
    if pattern == "commit":
        path = folder / "commits" / "0000000002.json"
    else:
        (path,) = folder.glob(f"step-00000001/attempt-*/{pattern}")
    damage(path)
    capsys.readouterr()
    assert main(arguments) == 3
    shown = "".join(capsys.readouterr().out.split())
    expected = "nologrecord2" if pattern == "commit" and damage is lose else path.name
    assert expected in shown
