"""Actor pools on a real Ray cluster, with small work that dies, waits or is wrong."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from support import pool_work
from support.observers import RecordingObserver
from support.pool_work import (
    BallastWork,
    DeadlyWork,
    FileWork,
    GatedWork,
    UnpicklableError,
    WrongWork,
    wait_until,
)
from support.ray_clusters import start_head

from fqgan_dist.errors import ClusterError, DataError
from fqgan_dist.orchestration.config import PoolConfig
from fqgan_dist.orchestration.pools import open_pool

pytestmark = pytest.mark.ray

TESTS_DIR = Path(__file__).parents[1]
SLOT = {"slot": 1.0}
"""A resource of which each node has one, so that a second actor needs a second node."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with two CPU slots."""
    # Actors cannot import `support`: its classes travel as code.
    cloudpickle.register_pickle_by_value(pool_work)
    cluster = start_head(num_cpus=2, resources=SLOT)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    cloudpickle.unregister_pickle_by_value(pool_work)


def run(work: FileWork, check_node: Callable[[], None] | None = None, **settings: Any) -> None:
    config = PoolConfig.model_validate(settings)
    with open_pool(
        "files", config, observer=RecordingObserver(), check_node=check_node
    ) as run_chunks:
        run_chunks(work)


@contextmanager
def running(work: FileWork, **settings: Any) -> Iterator[Callable[[], bool]]:
    """Run a pool in a thread during the block and then to its end; gives whether it has ended.

    Nodes can be added from the main thread only.
    """
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(run, work, **settings)
        try:
            yield future.done
        finally:
            if isinstance(work, GatedWork):
                work.open_gates(*work.chunks())
        future.result()


def test_chunk_committed_by_an_actor_that_died_is_not_made_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    work = DeadlyWork(tmp_path, 3, chunk=1, times=1, after_commit=True)
    observer = RecordingObserver()
    work.context.storage.write_bytes("files/0", b"{}")
    with open_pool("files", PoolConfig(max_failures_per_chunk=0), observer=observer) as run_chunks:
        run_chunks(work)
    assert [len(work.tries(chunk)) for chunk in work.chunks()] == [0, 1, 1]
    # Every chunk is counted once: the one that was done, the one with the lost answer, the last.
    (bar,) = observer.bars
    state = bar.state()
    assert (state.total, state.skipped, bar.advanced) == (6, 1, [2, 3])
    assert state.fields == {"actors": 1}


def test_chunk_that_kills_its_actors_ends_the_pool_by_its_name(
    cluster: Cluster, tmp_path: Path
) -> None:
    work = DeadlyWork(tmp_path, 3, chunk=1, times=99)
    with pytest.raises(
        ClusterError, match=r"files: chunk 1 lost its actor 2 times.*worker process"
    ):
        run(work, max_failures_per_chunk=1)
    assert len(work.tries(1)) == 2
    assert work.is_done(0)


def test_error_of_the_work_ends_the_pool_at_once(cluster: Cluster, tmp_path: Path) -> None:
    work = WrongWork(tmp_path, 9, chunk=1, error=lambda: UnpicklableError("a.tar", 3))
    with pytest.raises(DataError, match=r"^a\.tar: line 3 is wrong") as caught:
        run(work)
    (note,) = caught.value.__notes__
    assert "in chunk 1 of files, actor 0" in note
    assert "raise self.error()" in note
    assert not any(work.is_done(chunk) for chunk in range(1, 9))


@pytest.mark.full("starts actors; another process is tried for every lost chunk")
def test_memory_that_is_short_in_one_process_is_found_in_another(
    cluster: Cluster, tmp_path: Path
) -> None:
    work = WrongWork(tmp_path, 3, chunk=1, error=MemoryError)
    run(work)
    first, second = work.tries(1)
    assert first != second == work.outputs()[1]["pid"]


@pytest.mark.full("starts actors; the checks are unit tests")
def test_node_that_fails_its_check_ends_the_pool(cluster: Cluster, tmp_path: Path) -> None:
    def refuse() -> None:
        raise ClusterError("no shared root here")

    work = FileWork(tmp_path, 3)
    with pytest.raises(ClusterError, match="no shared root here"):
        run(work, check_node=refuse)
    assert not any(work.tries(chunk) for chunk in work.chunks())


def test_actors_that_all_die_while_they_start_end_the_pool(
    cluster: Cluster, tmp_path: Path
) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ClusterError, match=r"files: 1 actors died while they started.*process"):
        run(FileWork(tmp_path, 3), check_node=die, max_failures_per_chunk=0)


@pytest.mark.full("waits; the release is proven by test_pool_queue")
def test_idle_actors_are_released_while_the_last_chunk_is_worked_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    work = GatedWork(tmp_path, 3)
    with running(work, max_actors=2) as has_ended:
        wait_until(lambda: bool(work.tries(0) and work.tries(1)))
        assert ray.available_resources().get("CPU", 0) == 0
        work.open_gates(0, 2)
        wait_until(lambda: ray.available_resources().get("CPU", 0) == 1)
        wait_until(lambda: not psutil.pid_exists(work.tries(0)[0]))
        assert not has_ended()


def test_one_process_does_all_works_of_a_pool(cluster: Cluster, tmp_path: Path) -> None:
    first, second = BallastWork(tmp_path / "first", 2), BallastWork(tmp_path / "second", 2)
    checks = tmp_path / "checks"
    checks.mkdir()

    def check() -> None:
        (checks / str(os.getpid())).touch(exist_ok=False)

    with open_pool(
        "files", PoolConfig(), observer=RecordingObserver(), check_node=check
    ) as run_chunks:
        run_chunks(first)
        run_chunks(second)
        (pid,) = {output["pid"] for output in first.outputs() + second.outputs()}
        assert psutil.pid_exists(int(pid))
    wait_until(lambda: not psutil.pid_exists(int(pid)))
    # Each chunk has counted what is loaded in its process: never that of the former work too.
    assert first.num_loaded() == second.num_loaded() == [1, 1]
    logs = [path for path in tmp_path.glob("*/logs/*") if "-actor-" in path.name]
    assert len(logs) == 1
    assert logs[0].read_text().count("chunk 1 is done") == 2


@pytest.mark.full("waits; the release is proven by test_pool_queue")
def test_actors_beyond_the_least_are_released_between_two_works(
    cluster: Cluster, tmp_path: Path
) -> None:
    first, second = GatedWork(tmp_path / "first", 3), FileWork(tmp_path / "second", 1)
    first.open_gates(2)
    with (
        open_pool("files", PoolConfig(max_actors=2), observer=RecordingObserver()) as run_chunks,
        ThreadPoolExecutor(1) as thread,
    ):
        work = thread.submit(run_chunks, first)
        wait_until(lambda: bool(first.tries(0) and first.tries(1)))
        first.open_gates(0, 1)
        work.result()
        wait_until(lambda: ray.available_resources().get("CPU", 0) == 1)
        run_chunks(second)
    assert second.tries(0)[0] in {first.tries(0)[0], first.tries(1)[0]}
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 2)


def test_actor_that_died_between_two_works_is_replaced_and_no_chunk_blamed(
    cluster: Cluster, tmp_path: Path
) -> None:
    first, second = FileWork(tmp_path / "first", 1), FileWork(tmp_path / "second", 1)
    config = PoolConfig(max_failures_per_chunk=0)
    with open_pool("files", config, observer=RecordingObserver()) as run_chunks:
        run_chunks(first)
        (pid,) = first.tries(0)
        os.kill(pid, signal.SIGKILL)
        run_chunks(second)
    assert len(second.tries(0)) == 1
    assert second.tries(0) != [pid]


def test_actors_die_with_a_killed_driver(cluster: Cluster, tmp_path: Path) -> None:
    program = (
        "import ray, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from support import observers, pool_work\n"
        "from fqgan_dist.orchestration.pools import open_pool\n"
        "from fqgan_dist.orchestration.config import PoolConfig\n"
        "ray.cloudpickle.register_pickle_by_value(pool_work)\n"
        "ray.init(address=sys.argv[2])\n"
        "work = pool_work.GatedWork(Path(sys.argv[3]), 1)\n"
        "observer = observers.RecordingObserver()\n"
        "with open_pool('files', PoolConfig(), observer=observer) as run_chunks:\n"
        "    run_chunks(work)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(TESTS_DIR), str(cluster.address), str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = GatedWork(tmp_path, 1)
    try:
        wait_until(lambda: bool(work.tries(0)))
    finally:
        driver.kill()
        driver.wait()
    (pid,) = work.tries(0)
    wait_until(lambda: not psutil.pid_exists(pid))


@pytest.mark.full("starts a node; growth is proven by test_pool_queue")
def test_node_that_joins_a_running_pool_gets_the_work_that_waits(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = GatedWork(tmp_path, 3)
    with caplog.at_level(logging.WARNING), running(work, max_actors=2, custom=SLOT):
        wait_until(lambda: "wait for resources" in caplog.text)
        assert "1 of 2 actors wait for resources: each needs 1 CPU, 1 slot, and free" in caplog.text
        assert not work.tries(1)
        node = cluster.add_node(num_cpus=1, resources=SLOT)
        wait_until(lambda: bool(work.tries(1)))
    first, second, _ = (output["node"] for output in work.outputs())
    assert first != second == node.node_id


@pytest.mark.full("waits for a shortage to be noticed; its words are proven without Ray")
def test_resources_that_no_node_has_are_named(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = FileWork(tmp_path, 1)
    with caplog.at_level(logging.WARNING), running(work, custom={"rocket": 1.0}):
        try:
            wait_until(lambda: "wait for resources" in caplog.text)
        finally:
            cluster.add_node(num_cpus=1, resources={"rocket": 1.0})
    assert "each needs 1 CPU, 1 rocket, and no node of the cluster has that" in caplog.text
    assert "(the most of each: 2 CPU, 0 rocket)" in caplog.text


def test_chunk_of_a_lost_node_is_made_on_another(cluster: Cluster, tmp_path: Path) -> None:
    island = {"island": 1.0}
    first = cluster.add_node(num_cpus=1, resources=island)
    work = GatedWork(tmp_path, 1)
    with running(work, custom=island):
        try:
            wait_until(lambda: bool(work.tries(0)))
        finally:
            second = cluster.add_node(num_cpus=1, resources=island)
            cluster.remove_node(first, allow_graceful=False)
        wait_until(lambda: len(work.tries(0)) == 2)
    assert work.outputs()[0]["node"] == second.node_id
