"""MLflow with a store in a folder: no server and no network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.sessions import resumed_at

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.metric_sink import TrackedRun

LOSS, PSNR = "tokenizer/loss/total", "tokenizer/validation/psnr"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return TrackedRun(storage=Storage(tmp_path / "run"), stage="tokenizer", name="trial")


def write_steps(run: TrackedRun, steps: range, *, killed_before_evaluation: bool = False) -> None:
    from fqgan_dist.telemetry.sinks.mlflow import build_sink

    sink = build_sink(run)
    sink.open(resumed_at(steps.start - 1))
    for step in steps:
        sink.write(step, {LOSS: 1 / step}, images_seen=8 * step)
    if not killed_before_evaluation:
        sink.write(steps[-1], {PSNR: math.inf}, images_seen=8 * steps[-1])
    sink.flush()
    if not killed_before_evaluation:
        sink.close()


def test_sessions_are_one_run_whose_steps_are_not_repeated(run: TrackedRun) -> None:
    from mlflow.tracking import MlflowClient

    write_steps(run, range(1, 5), killed_before_evaluation=True)
    write_steps(run, range(3, 5))  # resumed at step 2, and now evaluated
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fqgan-dist")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "trial tokenizer"
    assert found.info.status == "FINISHED"

    def history(name: str) -> list[tuple[int, float]]:
        return [
            (each.step, each.value) for each in client.get_metric_history(found.info.run_id, name)
        ]

    assert history(LOSS) == [(step, 1 / step) for step in range(1, 5)]
    assert history(PSNR) == [(4, math.inf)]
    assert history("images_seen") == [(step, 8.0 * step) for step in range(1, 5)]


def test_a_training_of_its_own_is_a_run_of_its_own(run: TrackedRun, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    other = TrackedRun(storage=Storage(tmp_path / "other"), stage="tokenizer", name="trial")
    for each in (run, other):
        write_steps(each, range(1, 3))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fqgan-dist")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
