"""Notice on a real cluster and by real signals: the step in flight is finished and committed.

Nothing is lost of what is drained or signalled: each attempt goes on from the last step that the
one before it recorded, and the run ends equal to the bit with one that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import _raylet
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.state import list_actors
from support.metadata_service import TERMINATE, MetadataService, run_metadata_service
from support.ray_clusters import start_head
from support.waiting import wait_until

from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.json_lines import read_lines
from fqgan_dist.training.commit_log import CommitLog, CommitRecord

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
STEPS = 150
SAVE_EVERY = 50
TIMEOUT_S = 400
ON_RAY = ("execution=ray", "ray.train.num_workers=2")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2 * TIMEOUT_S)]


class Run:
    """One run, whose checkpoints come by notice alone; `start` it again and it goes on."""

    def __init__(self, folder: Path, *options: str, address: str | None = None) -> None:
        self.root = folder / "run"
        self._log = folder / "log"
        self._command = [
            *(sys.executable, "-m", "fqgan_dist.cli", "run", str(TINY)),
            *(f"storage.root={self.root}", "stages=[shards, teachers, tokenizer]"),
            f"tokenizer.training.steps={STEPS}",
            f"tokenizer.training.checkpoint.every={SAVE_EVERY}",
            *("tokenizer.training.evaluate_every=1000", "--json", *options),
        ]
        self._environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if address is not None:
            self._environment |= {"RAY_ADDRESS": address}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, text=True
            )
        return self.process

    def end(self) -> int:
        """Wait for its end, and leave nothing of it behind; gives its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(TIMEOUT_S)
        finally:
            self.process.kill()
            self.process.wait()

    def wait_for_commit(self) -> None:
        """Wait until a step is committed; the next one by itself is long away."""
        process = self.process
        assert process is not None
        wait_until(lambda: bool(self.commits()) or process.poll() is not None)
        assert process.poll() is None, self.log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def sessions(self) -> list[tuple[int, int]]:
        """Give, of each attempt at the training, the step before its first, and its last."""
        files = sorted((self.root / "tokenizer" / "sessions").glob("*/metrics.jsonl"))
        records = [read_lines(file.read_bytes(), name=str(file))[0] for file in files]
        return [(lines[0][0] - 1, lines[-1][0]) for lines in records if lines]

    def check_nothing_lost(self) -> None:
        """Check that what the attempt before the last did last is what the last went on from."""
        sessions = self.sessions()
        assert len(sessions) == 2, self.log
        (first, told), (resumed, last) = sessions
        assert (first, last) == (0, STEPS)
        assert resumed == told
        assert told % SAVE_EVERY, "an ordinary checkpoint, for all one can tell"

    def commits(self) -> list[CommitRecord]:
        log = CommitLog(Storage(self.root / "tokenizer" / "checkpoints"))
        records = [log.read(number) for number in log.numbers()]
        return [record for record in records if isinstance(record, CommitRecord)]

    def weights(self) -> Any:
        """Give the digest of the weights that it ended with."""
        return json.loads((self.root / "manifests" / "tokenizer.json").read_text())["outputs"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights of the run that nobody disturbs, on two ranks."""
    run = Run(tmp_path_factory.mktemp("calm"), *ON_RAY, "ray.local_cpus=2")
    run.start()
    assert run.end() == 0, run.log
    return run.weights()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataService]:
    """EC2's metadata service of all nodes, which takes one of them back."""
    with run_metadata_service() as service:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.address)
        yield service


@pytest.fixture
def cluster(service: MetadataService) -> Iterator[Cluster]:
    """A head for the driver, and three nodes of one train worker each."""
    service.tells_once = True
    cluster = start_head(num_cpus=1)
    for _ in range(3):
        cluster.add_node(num_cpus=1, resources={"spot": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def train_workers() -> list[Any]:
    actors: list[Any] = list_actors(filters=[("state", "=", "ALIVE")])
    return [actor for actor in actors if "TrainWorker" in actor.class_name]


def drain(worker: Any, address: str, _: MetadataService) -> None:
    """Let Ray drain the node of a train worker: what `ray drain-node` asks of the head."""
    clients: Any = _raylet
    reasons: Any = autoscaler_pb2
    is_accepted, why_not = clients.GcsClient(address=address).drain_node(
        worker.node_id,
        reasons.DRAIN_NODE_REASON_PREEMPTION,
        "test",
        int((time.time() + 20) * 1000),
    )
    assert is_accepted, why_not


def terminate(worker: Any, _: str, __: MetadataService) -> None:
    """Ask the process of a train worker to end."""
    os.kill(worker.pid, signal.SIGTERM)


def take_back(_: Any, __: str, service: MetadataService) -> None:
    """Let EC2 take a node back, whose rank is the first to ask."""
    service.action = TERMINATE


@pytest.mark.full("minutes on a cluster of four nodes; each part is proven without Ray")
@pytest.mark.parametrize("give_notice", [drain, terminate, take_back])
def test_a_rank_that_is_given_notice_costs_no_step(
    give_notice: Callable[[Any, str, MetadataService], None],
    cluster: Cluster,
    service: MetadataService,
    calm: Any,
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, *ON_RAY, "ray.train.custom={spot: 1}", address=cluster.address)
    run.start()
    wait_until(lambda: len(train_workers()) == 2)
    worker = train_workers()[-1]
    run.wait_for_commit()
    give_notice(worker, str(cluster.address), service)
    assert run.end() == 0, run.log
    run.check_nothing_lost()
    assert run.weights() == calm
    assert run.log.count("planned restart: ") == 1
    assert "back at step" in run.log
    assert "its process or node was lost" not in run.log


@pytest.mark.full("trains on Ray; what the signal does is proven without it")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_driver_that_is_asked_to_end_saves_first(
    number: signal.Signals, code: int, calm: Any, tmp_path: Path
) -> None:
    run = Run(tmp_path, *ON_RAY, "ray.local_cpus=2")
    process = run.start()
    run.wait_for_commit()
    process.send_signal(number)
    assert run.end() == code, run.log
    ((_, told),) = run.sessions()
    assert told == run.commits()[-1].step
    assert "Traceback" not in run.log
    assert run.log.rstrip().endswith("the same command continues")
    run.start()
    assert run.end() == 0, run.log
    run.check_nothing_lost()
    assert run.weights() == calm
