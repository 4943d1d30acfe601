"""A run whose second worker has no node yet waits for it, past `start_timeout_s`, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ray_clusters import start_head
from support.waiting import wait_until

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
TIMEOUT_S = 400

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2 * TIMEOUT_S)]


def start(
    root: Path, log: Path, *options: str, address: str | None = None
) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if address is not None:
        environment |= {"RAY_ADDRESS": address}
    with log.open("w") as file:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "fqgan_dist.cli", "run", str(TINY), f"storage.root={root}"),
                *("execution=ray", "ray.train.num_workers=2", "--json"),
                "stages=[shards, teachers, tokenizer]",
                *options,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of a run behind, whatever became of the test."""
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        end(process)
    assert process.returncode == 0, log.read_text()[-4000:]
    return {name: stage["metrics"] for name, stage in json.loads(output).items()}


@pytest.mark.full("waits for capacity; the policy is proven in unit/orchestration")
def test_a_run_waits_for_the_node_of_its_second_worker(tmp_path: Path) -> None:
    log = tmp_path / "log"
    calm = finish(start(tmp_path / "calm", log, "ray.local_cpus=2"), log)
    cluster = start_head(num_cpus=1)
    process = start(tmp_path / "run", log, "ray.train.start_timeout_s=10", address=cluster.address)
    try:
        wait_until(lambda: log.read_text().count("did not start within") >= 2)
        assert process.poll() is None
        assert "patience.capacity_s: " in log.read_text()
        cluster.add_node(num_cpus=1)
        assert finish(process, log) == calm
    finally:
        end(process)
        cluster.shutdown()


@pytest.mark.full("waits for capacity; the policy is proven in unit/orchestration")
def test_patience_for_capacity_ends_with_a_code_that_says_try_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    cluster = start_head(num_cpus=1)
    options = ("ray.train.start_timeout_s=5", "patience.capacity_s=12")
    process = start(tmp_path / "run", log, *options, address=cluster.address)
    try:
        process.communicate(timeout=TIMEOUT_S)
    finally:
        end(process)
        cluster.shutdown()
    assert process.returncode == 75
    last = log.read_text().strip().splitlines()[-1]
    assert "no progress for" in last
    assert "patience.capacity_s: 12" in last
