"""Weights & Biases offline: its sessions are files, and no key and no network are needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sessions import resumed_at

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metric_sink import TrackedRun

LOSS = "tokenizer/loss/total"
_BLOCK = 32768


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return TrackedRun(storage=Storage(tmp_path), stage="tokenizer", name="trial")


def write_session(run: TrackedRun, steps: range) -> tuple[Any, list[dict[str, Any]]]:
    """Write some steps in a session, and return the run and the rows of history in its file."""
    from fqgan_dist.telemetry.sinks.wandb import build_sink

    sink = build_sink(run)
    sink.open(resumed_at(steps.start - 1))
    for step in steps:
        sink.write(step, {LOSS: 1 / step}, images_seen=8 * step)
        sink.write(step, {"tokenizer/validation/psnr": 20.0}, images_seen=8 * step)
    sink.flush()
    sink.close()
    folder = run.storage.local_path("tokenizer/tracking/wandb")
    assert folder is not None
    (path,) = folder.glob("offline-run-*/*.wandb")
    session = read_session(path)
    # W&B names a session by its second, and the next one may begin in the same.
    path.parent.rename(folder / f"session-{steps.start}")
    return session


def read_session(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Read the run and the rows of its history from a session's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    run, rows = None, []
    for data in read_log(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("run"):
            run = record.run
        if record.HasField("history"):
            items = record.history.item
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            rows.append({"step": record.history.step.num} | row)
    return run, rows


def read_log(data: bytes) -> Iterator[bytes]:
    """Read records that LevelDB's log format cuts into blocks, behind W&B's header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield record
            record = b""


def test_a_resumed_training_continues_its_run(run: TrackedRun) -> None:
    sessions = [write_session(run, range(1, 4)), write_session(run, range(4, 6))]
    assert {session.run_id for session, _ in sessions} == {run.load_id()}
    assert {session.project for session, _ in sessions} == {"fqgan-dist"}
    assert {session.display_name for session, _ in sessions} == {"trial tokenizer"}
    rows = [row for _, history in sessions for row in history]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row[LOSS] == 1 / row["step"]
        assert row["tokenizer/validation/psnr"] == 20.0
        assert row["images_seen"] == 8 * row["step"]


def test_steps_that_its_history_has_are_not_sent_again(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    # What the server tells of a run that it knows: the first step that it has not.
    monkeypatch.setattr(wandb.Run, "starting_step", property(lambda _: 5))
    _, rows = write_session(run, range(3, 7))
    assert [row["step"] for row in rows] == [5, 6]
