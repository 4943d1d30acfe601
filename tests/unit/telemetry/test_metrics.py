from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.records import read_records
from support.sessions import resumed_at

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metrics import MetricsFile, metric_series

LOSS = "tokenizer/loss/commitment"


@contextmanager
def opened(
    path: Path, *, resumed_step: int = 0, clock: Callable[[], float] = time.time
) -> Iterator[MetricsFile]:
    """Open a file for a block, below a root two folders up."""
    storage = Storage(path.parent.parent)
    metrics = MetricsFile(storage, f"{path.parent.name}/{path.name}", clock=clock)
    metrics.open(resumed_at(resumed_step))
    yield metrics
    metrics.flush()
    metrics.close()


def write_steps(writer: MetricsFile, steps: range) -> None:
    for step in steps:
        writer.write(step, {LOSS: 1.0 / step}, images_seen=8 * step)


def constant_clock() -> float:
    return 1000.0


def test_records_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer" / "metrics.jsonl"
    with opened(path, clock=constant_clock) as writer:
        writer.write(1, {LOSS: 0.5, "train/images_per_s": 12}, images_seen=32)
    assert read_records(path) == [
        {"step": 1, "images_seen": 32, "time": 1000.0, LOSS: 0.5, "train/images_per_s": 12.0}
    ]


def test_a_resumed_file_equals_an_unbroken_one(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken/metrics.jsonl", tmp_path / "broken/metrics.jsonl"
    with opened(unbroken, clock=constant_clock) as writer:
        write_steps(writer, range(1, 9))
    with opened(broken, clock=constant_clock) as writer:
        write_steps(writer, range(1, 7))
    with opened(broken, resumed_step=4, clock=constant_clock) as writer:
        write_steps(writer, range(5, 9))
    assert broken.read_bytes() == unbroken.read_bytes()


def test_a_fresh_start_drops_an_older_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with opened(path) as writer:
        write_steps(writer, range(1, 4))
    with opened(path) as writer:
        writer.write(1, {LOSS: 2.0}, images_seen=8)
    assert [record[LOSS] for record in read_records(path)] == [2.0]


def test_a_flush_brings_records_to_readers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with opened(path) as writer:
        write_steps(writer, range(1, 3))
        writer.flush()
        assert len(read_records(path)) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_become_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with opened(path) as writer:
        writer.write(1, {LOSS: value}, images_seen=1)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)[LOSS] is None


def test_a_step_that_goes_back_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "metrics.jsonl") as writer:
        writer.write(5, {}, images_seen=5)
        writer.write(5, {}, images_seen=5)
        with pytest.raises(ValueError, match="step 4 follows step 5"):
            writer.write(4, {}, images_seen=4)


@pytest.mark.parametrize("name", ["step", "loss", "/loss", "a//b", "a/b c", "a/b\n", ""])
def test_a_wrong_metric_name_is_refused(tmp_path: Path, name: str) -> None:
    with (
        opened(tmp_path / "metrics.jsonl") as writer,
        pytest.raises(ValueError, match="metric name"),
    ):
        writer.write(1, {name: 1.0}, images_seen=1)


def test_a_series_leaves_out_records_without_the_metric() -> None:
    records = [
        {"step": 1, "a/b": 3.0},
        {"step": 2},
        {"step": 3, "a/b": None},
        {"step": 4, "a/b": 0},
    ]
    assert metric_series(records, "a/b") == ([1, 4], [3.0, 0])
