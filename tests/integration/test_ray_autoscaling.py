"""A cluster that grows for a run and shrinks after it: Ray's own autoscaler on fake nodes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.ray_clusters import NodeSpec, RayCluster, run_ray_cluster

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
IDLE_S = 120.0
"""Nodes go after 6 s of idleness; a busy machine takes longer to notice."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head without slots; nodes of one CPU come when they are asked for."""
    worker = {
        "resources": {"CPU": 1, "object_store_memory": 100_000_000},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
    with run_ray_cluster([NodeSpec(num_cpus=0)], autoscaled=worker) as cluster:
        yield cluster


class NodeCount:
    """Counts the nodes again and again while a block runs."""

    def __init__(self, cluster: RayCluster) -> None:
        self.seen: list[int] = []
        self._cluster = cluster
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> NodeCount:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.seen.append(self._cluster.count_nodes())


def wait_until(is_true: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_true():
            return True
        time.sleep(1.0)
    return False


@pytest.mark.full("waits for an autoscaler")
def test_a_head_without_slots_grows_for_the_run_and_shrinks_after_it(
    cluster: RayCluster, tmp_path: Path
) -> None:
    assert cluster.count_nodes() == 1
    root = tmp_path / "root"
    with NodeCount(cluster) as nodes:
        done = cluster.submit(
            "fqgan",
            "run",
            str(TINY),
            "execution=ray",
            f"storage.root={root}",
            "stages=[shards, teachers, tokenizer]",
            "ray.train.num_workers=2",
            "ray.pools.teachers.max_actors=2",
            timeout_s=600,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    assert [stage["state"] for stage in summary.values()] == ["done"] * 3
    # At least: a node that goes while another comes is counted with it for a moment.
    assert max(nodes.seen) >= 3, nodes.seen
    assert wait_until(lambda: cluster.count_nodes() == 1, IDLE_S), cluster.count_nodes()
