"""An actor that hangs in a chunk, or is stopped, is ended with its stacks, and replaced."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle
from rich.console import Console
from support import pool_work
from support.pool_work import HangingWork
from support.ray_clusters import start_head

from fqgan_dist.activity import WatchdogConfig
from fqgan_dist.orchestration.config import PoolConfig
from fqgan_dist.orchestration.pool_actor import PoolWatch
from fqgan_dist.orchestration.pools import open_pool
from fqgan_dist.orchestration.progress_board import start_board
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.telemetry.notify import Notifier
from fqgan_dist.world import World

pytestmark = [
    pytest.mark.ray,
    pytest.mark.full("waits for actors to hang; the rules are proven in unit/telemetry"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(pool_work)
    cluster = start_head(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()
    cloudpickle.unregister_pickle_by_value(pool_work)


@pytest.fixture
def log_folder(tmp_path: Path) -> Iterator[Path]:
    """Where this process, the driver, and its actors write their logs."""
    before = list(logging.getLogger().handlers)
    configure_logging(World(), open_log_file(Storage(tmp_path), "run"))
    yield tmp_path / "logs"
    for handler in set(logging.getLogger().handlers).difference(before):
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "asleep"])
def test_a_chunk_whose_actor_hangs_is_given_to_another(
    is_stopped: bool, tmp_path: Path, log_folder: Path
) -> None:
    work = HangingWork(tmp_path, 6, chunk=4, is_stopped=is_stopped)
    board = start_board("files", ["files"], Notifier("files"))
    observer = board.observer("files")
    config = WatchdogConfig(after_s=8, warn_after_s=3, slow_after_s=60)
    with board.shown(Console(file=io.StringIO())), closing(observer.exchange()) as exchange:
        watch = PoolWatch(config, exchange)
        with open_pool("files", PoolConfig(), observer=observer, watch=watch) as run_chunks:
            run_chunks(work)
    first, second = work.tries(4)
    assert first != second
    assert not psutil.pid_exists(first)
    assert {each["pid"] for each in work.outputs()} == {first, second}
    logs = {path.name: path.read_text() for path in log_folder.iterdir()}
    (driver,) = [text for name, text in logs.items() if name.startswith("run-")]
    assert "chunk 4 waits again" in driver
    actor = logs[min(name for name in logs if name.startswith("files-actor-00000"))]
    stacks = driver if is_stopped else actor
    assert "pool_work.py" in stacks
    assert ("gave no sign of life, and was ended: last heard in" in driver) is is_stopped
    assert ("HangError: nothing moves since" in actor) is not is_stopped
