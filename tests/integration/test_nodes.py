"""One task per node, on a real Ray cluster of two nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from support.ray_clusters import start_head

from fqgan_dist.errors import ClusterError, DataError
from fqgan_dist.orchestration.nodes import list_nodes, run_on_every_node

pytestmark = pytest.mark.ray

TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPU slots and a worker node."""
    cluster = start_head(num_cpus=0)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def labels(cluster: Cluster) -> list[str]:
    return [node.label for node in list_nodes()]


def test_every_node_runs_it_once(cluster: Cluster) -> None:
    def report(text: str) -> tuple[str, str]:
        return text, ray.get_runtime_context().get_node_id()

    results = run_on_every_node(report, "hello", timeout_s=TIMEOUT_S)
    nodes = list_nodes()
    assert [node.is_head for node in nodes] == [True, False]
    assert results == {node.label: ("hello", node.node_id) for node in nodes}


def test_labels_name_address_and_short_id(cluster: Cluster) -> None:
    head, worker = list_nodes()
    assert head.label == f"{head.address} ({head.node_id[:8]}, head)"
    assert worker.label == f"{worker.address} ({worker.node_id[:8]})"


def test_a_node_that_has_no_free_slot_answers(cluster: Cluster, labels: list[str]) -> None:
    class Occupant:
        def is_ready(self) -> bool:
            return True

    actor_type: Any = ray.remote(num_cpus=1)(Occupant)
    occupant = actor_type.remote()
    assert ray.get(occupant.is_ready.remote())
    results = run_on_every_node(os.getpid, timeout_s=TIMEOUT_S)
    assert [type(result) for result in results.values()] == [int, int]
    ray.kill(occupant)


def test_an_error_of_one_node_is_that_nodes_result(cluster: Cluster, labels: list[str]) -> None:
    worker_id = list_nodes()[1].node_id

    def fail_on_worker() -> str:
        if ray.get_runtime_context().get_node_id() == worker_id:
            raise DataError("no such root here")
        return "fine"

    on_head, on_worker = run_on_every_node(fail_on_worker, timeout_s=TIMEOUT_S).values()
    assert on_head == "fine"
    assert type(on_worker) is DataError
    assert str(on_worker) == "no such root here"


def test_a_lost_worker_process_is_named(cluster: Cluster, labels: list[str]) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for label, result in run_on_every_node(die, timeout_s=TIMEOUT_S).items():
        assert isinstance(result, ClusterError)
        assert f"node {label}: its task was lost" in str(result)


def test_a_node_that_hangs_does_not_hold_the_others(cluster: Cluster, labels: list[str]) -> None:
    worker_id = list_nodes()[1].node_id

    def hang_on_worker() -> str:
        if ray.get_runtime_context().get_node_id() == worker_id:
            time.sleep(10_000)
        return "fine"

    on_head, on_worker = run_on_every_node(hang_on_worker, timeout_s=8.0).values()
    assert on_head == "fine"
    assert isinstance(on_worker, ClusterError)
    assert f"node {labels[1]}: no answer within 8 s" in str(on_worker)


def test_an_error_that_cannot_be_pickled_keeps_its_text(cluster: Cluster) -> None:
    def fail() -> None:
        error = ValueError("cannot travel")
        error.lock = __import__("threading").Lock()  # type: ignore[attr-defined]
        raise error

    for result in run_on_every_node(fail, timeout_s=TIMEOUT_S).values():
        assert isinstance(result, Exception)
        assert "cannot travel" in str(result)


def test_a_node_that_left_is_not_asked(cluster: Cluster) -> None:
    extra = cluster.add_node(num_cpus=0)
    assert len(list_nodes()) == 3
    cluster.remove_node(extra)
    assert len(list_nodes()) == 2
