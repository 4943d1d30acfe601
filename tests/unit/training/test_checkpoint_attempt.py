from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training import checkpoint_attempt
from fqgan_dist.training.checkpoint import Attempt, CheckpointStore, Fragment
from fqgan_dist.training.checkpoint_files import PartTensors
from fqgan_dist.training.writer_process import WriterHere

PREFIX = "checkpoints"
REST: dict[str, Any] = {"state": {}, "metrics": {}, "config": {}, "dataset_id": "d"}


def _store(root: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(Storage(root), PREFIX, **options)


def _save(attempt: Attempt, step: int) -> None:
    attempt.save(step, tensors={"weights": {"x": torch.full((8,), float(step))}}, **REST)


def test_a_save_that_returns_has_let_go_of_the_tensors(tmp_path: Path) -> None:
    tensor = torch.ones(1000)
    with _store(tmp_path).begin_attempt() as attempt:
        attempt.save(1, tensors={"weights": {"x": tensor}}, **REST)
        tensor.fill_(2)
        attempt.save(2, tensors={"weights": {"x": tensor}}, **REST)
        tensor.fill_(3)
    for step in (1, 2):
        loaded = _store(tmp_path).load_latest(step=step)
        assert loaded is not None
        assert torch.equal(loaded.read("weights")["x"], torch.full((1000,), float(step)))


def test_state_is_copied_too(tmp_path: Path) -> None:
    state = {"nested": [1]}
    with _store(tmp_path).begin_attempt() as attempt:
        attempt.save(1, tensors={}, **REST | {"state": state})
        state["nested"].append(2)
    loaded = _store(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.manifest.state == {"nested": [1]}


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("state", {"x": float("nan")}),
        ("state", {"x": (1, 2)}),
        ("state", {1: 2}),
        ("state", {"x": torch.ones(1)}),
        ("metrics", {"fid": float("inf")}),
        ("config", {"x": {1, 2}}),
    ],
)
def test_what_json_does_not_keep_is_refused_at_once(what: str, value: Any, tmp_path: Path) -> None:
    with (
        _store(tmp_path).begin_attempt() as attempt,
        pytest.raises(ValueError, match=f"^{what}: "),
    ):
        attempt.save(1, tensors={}, **REST | {what: value})


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "a.b"])
def test_a_part_name_that_is_no_plain_name_is_refused(name: str, tmp_path: Path) -> None:
    with (
        _store(tmp_path).begin_attempt() as attempt,
        pytest.raises(ValueError, match="expected names of letters"),
    ):
        attempt.save(1, tensors={name: {}}, **REST)


@pytest.mark.parametrize("step", [4, 5])
def test_a_step_is_saved_once_and_in_order(step: int, tmp_path: Path) -> None:
    with _store(tmp_path).begin_attempt() as attempt:
        _save(attempt, 5)
        with pytest.raises(ValueError, match=f"step {step} was saved already or is before step 5"):
            _save(attempt, step)
        assert attempt.last_step == 5


def test_a_write_error_surfaces_at_the_next_call_and_stays(tmp_path: Path) -> None:
    attempt = _store(tmp_path).begin_attempt()
    # A file where the checkpoint's folder must be: writing fails as on a broken disk.
    (tmp_path / PREFIX / "step-00000001").write_text("in the way")
    _save(attempt, 1)
    calls: list[Callable[[], None]] = [
        attempt.wait,
        attempt.raise_pending,
        lambda: _save(attempt, 2),
        attempt.close,
    ]
    for call in calls:
        with pytest.raises(Exception, match="step-00000001"):
            call()
    assert _store(tmp_path).load_latest() is None


def test_an_older_attempt_that_keeps_saving_stops_at_the_newer(tmp_path: Path) -> None:
    first_saves, newer_started = threading.Event(), threading.Event()
    old = _store(tmp_path).begin_attempt()

    def zombie() -> None:
        for step in range(1, 1000):
            _save(old, step)
            if step == 3:
                first_saves.set()
            if step == 6:
                # Whatever the timing, the zombie goes on after its successor has started.
                newer_started.wait()
        old.wait()

    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(zombie)
        first_saves.wait()
        new = _store(tmp_path).begin_attempt()
        resumed = _store(tmp_path).load_latest()
        newer_started.set()
        with pytest.raises(CheckpointError, match=rf"{old.id} was superseded.*{new.id}.*must stop"):
            running.result()
    assert resumed is not None
    new.continue_from(resumed.number)
    _save(new, resumed.step + 1)
    new.close()
    for call in (old.raise_pending, lambda: _save(old, 5000), old.close):
        with pytest.raises(CheckpointError, match="superseded"):
            call()
    commits = _store(tmp_path).list_commits()
    assert [commit.attempt for commit in commits] == [old.id] * (len(commits) - 1) + [new.id]
    # Nothing came between what the successor loaded and its own first commit.
    assert commits[-1].parent == commits[-2].number == resumed.number
    assert _store(tmp_path).verify() == []


def test_a_superseded_attempt_does_not_upload_first(tmp_path: Path) -> None:
    old = _store(tmp_path).begin_attempt()
    _store(tmp_path).begin_attempt().close()
    _save(old, 1)
    with pytest.raises(CheckpointError, match="superseded"):
        old.close()
    assert not list((tmp_path / PREFIX).glob("step-*"))


def test_who_sleeps_while_it_writes_and_is_swept_says_that_it_was_superseded(
    tmp_path: Path,
) -> None:
    class SleepingWriter(WriterHere):
        def write(self, *_: Any) -> Any:
            _store(tmp_path).begin_attempt().close()
            raise FileNotFoundError("what was half-written is gone")

    old = _store(tmp_path, make_writer=SleepingWriter).begin_attempt()
    _save(old, 1)
    with pytest.raises(CheckpointError, match="superseded"):
        old.close()


def _run_ranks(
    root: Path, parts: list[dict[str, PartTensors]], *, step: int = 1, **options: Any
) -> None:
    """Save with one thread per rank, each through its own store."""
    attempt = _store(root, **options).begin_attempt(world_size=len(parts))

    def run(rank: int) -> None:
        mine = attempt
        if rank:
            mine = _store(root).join_attempt(attempt.id, rank=rank, world_size=len(parts))
        with mine:
            mine.save(step, tensors=parts[rank], **REST)

    with ThreadPoolExecutor(len(parts)) as executor:
        for future in [executor.submit(run, rank) for rank in range(len(parts))]:
            future.result()


def _optimizer_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.exp_avg": (3, 5), "b.exp_avg": (7,), "c.exp_avg": (2, 2, 2), "d.exp_avg": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _partition(tensors: dict[str, Tensor], world_size: int) -> list[dict[str, Any]]:
    """Cut the concatenated flat tensors into equal ranges, as ZeRO-1 does."""
    total = sum(tensor.numel() for tensor in tensors.values())
    length = -(-total // world_size)
    owned: list[dict[str, Any]] = [{} for _ in range(world_size)]
    position = 0
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for rank in range(world_size):
            low = max(rank * length - position, 0)
            high = min((rank + 1) * length - position, flat.numel())
            if low < high:
                piece = flat[low:high]
                is_whole = len(piece) == flat.numel()
                owned[rank][name] = (
                    tensor if is_whole else Fragment(piece, start=low, shape=tuple(tensor.shape))
                )
        position += flat.numel()
    return owned


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_zero_partition_of_any_world_size_loads_as_whole_tensors(
    world_size: int, tmp_path: Path
) -> None:
    tensors = _optimizer_tensors()
    owned = _partition(tensors, world_size)
    weights = {"w": torch.arange(6).view(2, 3)}
    parts: list[dict[str, PartTensors]] = [
        {"optimizer": mine, "weights": weights if rank == 0 else {}}
        for rank, mine in enumerate(owned)
    ]
    _run_ranks(tmp_path, parts)
    loaded = _store(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.manifest.world_size == world_size
    merged = loaded.read("optimizer")
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert merged[name].shape == tensor.shape
        assert torch.equal(merged[name], tensor)
    assert torch.equal(loaded.read("weights")["w"], weights["w"])
    one = loaded.read("optimizer", ["b.exp_avg"])
    assert one.keys() == {"b.exp_avg"}
    assert torch.equal(one["b.exp_avg"], tensors["b.exp_avg"])


def test_two_owners_of_a_tensor_are_never_committed(tmp_path: Path) -> None:
    parts: list[dict[str, PartTensors]] = [{"weights": {"x": torch.ones(2)}} for _ in range(2)]
    with pytest.raises(CheckpointError, match=r"part 'weights', tensor 'x': written by 2 ranks"):
        _run_ranks(tmp_path, parts)
    assert _store(tmp_path).load_latest() is None


def test_a_rank_that_never_writes_is_named(tmp_path: Path) -> None:
    attempt = _store(tmp_path, rank_timeout_s=0.1).begin_attempt(world_size=3)
    with _store(tmp_path).join_attempt(attempt.id, rank=1, world_size=3) as other:
        _save(other, 1)
    attempt.save(1, tensors={"weights": {}}, **REST)
    missing = re.escape("1 of 3 ranks have not written their part after 0.1 s (rank-00002.json)")
    with pytest.raises(CheckpointError, match=missing):
        attempt.close()
    assert _store(tmp_path).load_latest() is None


def test_a_damaged_report_is_never_committed(tmp_path: Path) -> None:
    attempt = _store(tmp_path).begin_attempt(world_size=2)
    with _store(tmp_path).join_attempt(attempt.id, rank=1, world_size=2) as other:
        _save(other, 1)
    (report,) = (tmp_path / PREFIX).glob("step-*/*/rank-00001.json")
    report.write_bytes(report.read_bytes().replace(b'"bytes":', b'"bytes":1'))
    attempt.save(1, tensors={}, **REST)
    with pytest.raises(CheckpointError, match=r"rank-00001\.json: damaged"):
        attempt.close()


@pytest.mark.parametrize("rank", [0, 2, -1])
def test_only_other_ranks_of_the_world_join(rank: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}: expected 1 to 1"):
        _store(tmp_path).join_attempt("a" * 32, rank=rank, world_size=2)


def test_the_error_of_a_training_is_not_kept_waiting_by_a_rank_that_died(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_attempt, "_ABANDONED_WAIT_S", 0.1)
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="the training failed"),
        _store(tmp_path, rank_timeout_s=3600).begin_attempt(world_size=2) as attempt,
    ):
        _save(attempt, 1)
        raise RuntimeError("the training failed")
    assert "the save of step 1 was not committed: " in caplog.text
    assert "1 of 2 ranks have not written their part" in caplog.text


def test_a_last_save_is_committed_though_the_training_failed(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(RuntimeError, match="the training failed"),
        _store(tmp_path).begin_attempt() as attempt,
    ):
        _save(attempt, 1)
        raise RuntimeError("the training failed")
    assert _store(tmp_path).load_latest(step=1) is not None
