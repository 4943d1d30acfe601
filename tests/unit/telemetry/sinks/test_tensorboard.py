from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metric_sink import TrackedRun
from fqgan_dist.telemetry.sinks.tensorboard import build_sink

LOSS = "tokenizer/loss/commitment"


def write_steps(run: TrackedRun, steps: range) -> None:
    sink = build_sink(run)
    sink.open(steps.start - 1)
    for step in steps:
        sink.write(step, {LOSS: 1.0 / step}, images_seen=8 * step)
    sink.flush()
    sink.close()


def test_it_has_the_values_and_forgets_what_a_killed_session_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = TrackedRun(storage=Storage(tmp_path), stage="tokenizer", name="trial")
    write_steps(run, range(1, 6))
    write_steps(run, range(4, 7))
    events = EventAccumulator(str(tmp_path / "tokenizer" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars(LOSS)] == [
        (step, pytest.approx(1 / step)) for step in range(1, 7)
    ]
