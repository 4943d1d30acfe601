"""The progress board, the dashboard's gauges and the explanation of failures on a real Ray."""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from fqgan_dist.errors import DataError
from fqgan_dist.orchestration.failures import explain_failure, stamp_errors
from fqgan_dist.orchestration.progress_board import ProgressBoard, RayObserver, start_board
from fqgan_dist.telemetry.notify import Notifier
from fqgan_dist.telemetry.progress import WorkProgress
from fqgan_dist.telemetry.run_view import StageView
from fqgan_dist.world import World

pytestmark = pytest.mark.ray

# Ray's processes have nice 15: beside other tests, one takes many seconds to start.
_DEADLINE_S = 60
_STEPS = 100
_FAILING_STEP = 2


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Other Rays of this machine are not ours.
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        # Workers cannot import the tests.
        module = sys.modules[__name__]
        cloudpickle.register_pickle_by_value(module)
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(module)
            ray.shutdown()


@pytest.fixture
def board() -> Iterator[ProgressBoard]:
    board = start_board("tiny", ["teachers", "tokenizer"], Notifier("tiny"))
    yield board
    ray.kill(board._actor)


def wait_for(what: str, find: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _DEADLINE_S
    while not (found := find()):
        assert time.monotonic() < deadline, f"no {what} in {_DEADLINE_S} s"
        time.sleep(0.2)
    return found


def stage_of(board: ProgressBoard, name: str) -> StageView:
    return next(stage for stage in board.stages() if stage.name == name)


def complete_work(board: ProgressBoard, name: str) -> WorkProgress | None:
    work = stage_of(board, name).work
    return work if work is not None and work.is_complete else None


@ray.remote(num_cpus=1)
def work_elsewhere(observer: RayObserver) -> None:
    with observer.track(50, "teacher features", "images") as bar:
        bar.skip(20)
        bar.advance(30, loss=0.5)
        observer.record_metrics("tokenizer", 7, {"tokenizer/loss/total": 0.25})


def test_work_on_a_worker_is_seen_in_the_drivers_view_and_on_the_dashboard(
    board: ProgressBoard,
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with board.shown(console):
        ray.get(work_elsewhere.remote(board.observer("teachers")))
        board.finish_stage("teachers", "done")
        work = wait_for("the last news", lambda: complete_work(board, "teachers"))
        lines = wait_for("gauges", _read_gauges)
    assert (work.description, work.done, work.total) == ("teacher features", 50, 50)
    assert stage_of(board, "teachers").state == "done"
    assert isinstance(console.file, io.StringIO)
    assert "50/50 images" in console.file.getvalue()
    assert lines["fqgan_stage_progress"] == {'run="tiny",stage="teachers"': 1.0}
    assert lines["fqgan_units_done"] == {'run="tiny",stage="teachers"': 50.0}
    assert lines["fqgan_metric"] == {'run="tiny",stage="tokenizer"': 0.25}


def test_work_goes_on_when_the_board_is_gone(board: ProgressBoard) -> None:
    observer = pickle.loads(pickle.dumps(board.observer("teachers")))
    ray.kill(board._actor)
    start = time.monotonic()
    with observer.track(1000, "teacher features", "images") as bar:
        for _ in range(1000):
            bar.advance()
            observer.record_metrics("teachers", 1, {"teachers/loss/total": 1.0})
    assert time.monotonic() - start < 5
    board.finish_stage("teachers", "done")
    assert stage_of(board, "teachers").state == "done"


def test_a_board_that_is_started_again_learns_all_from_the_next_message(
    board: ProgressBoard,
) -> None:
    observer = board.observer("teachers")
    with observer.track(100, "teacher features", "images") as bar:
        bar.advance(10)
        wait_for("news", lambda: stage_of(board, "teachers").work)
        ray.kill(board._actor, no_restart=False)
        bar.advance(10)

        def is_seen() -> bool:
            work = stage_of(board, "teachers").work
            return work is not None and work.done == 20

        wait_for("the state after the restart", is_seen)


def train(arguments: dict[str, Any]) -> None:
    with stamp_errors():
        world = World.from_environment()
        for step in range(_STEPS):
            if step == _FAILING_STEP and world.rank == 1:
                if arguments["how"] == "raise":
                    raise DataError("shard-000007.tar: cannot decode")
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1))


# Ray Train imports Ray Data, which sets its own deprecated options.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
@pytest.mark.parametrize(
    "how",
    [
        "raise",
        pytest.param("kill", marks=pytest.mark.full("as an exception, which is tried always")),
    ],
)
def test_the_first_failing_ranks_cause_comes_first(how: str, tmp_path: Path) -> None:
    trainer = TorchTrainer(
        train,
        train_loop_config={"how": how},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name=how,
            storage_path=str(tmp_path),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    with pytest.raises(WorkerGroupError) as caught:
        trainer.fit()
    report = explain_failure(caught.value)
    assert report.first.place.startswith("rank 1")
    assert (report.cause == "permanent") is (how == "raise")
    expected = "DataError: shard-000007.tar" if how == "raise" else "process or node was lost"
    assert expected in report.text.splitlines()[0]


def _read_gauges() -> dict[str, dict[str, float]]:
    """Read our gauges back as Prometheus does: name -> its first two tags -> value."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if line.startswith("ray_fqgan_"):
            name, _, rest = line.removeprefix("ray_").partition("{")
            tags, _, value = rest.rpartition("} ")
            own = [tag for tag in tags.split(",") if tag.startswith(("run=", "stage="))]
            found.setdefault(name, {})[",".join(own)] = float(value)
    # Set values reach the endpoint some seconds later.
    is_last = found.get("fqgan_units_done") == {'run="tiny",stage="teachers"': 50.0}
    return found if is_last and "fqgan_metric" in found else {}
