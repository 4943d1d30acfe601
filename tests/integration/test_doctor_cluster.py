"""`fqgan doctor` on a real Ray cluster of two nodes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from support.ray_clusters import start_head

from fqgan_dist.cli import DONE, FAILED, main
from fqgan_dist.orchestration.cluster_checks import check_shared_root
from fqgan_dist.orchestration.nodes import list_nodes

pytestmark = pytest.mark.ray

TINY = Path(__file__).resolve().parents[1] / "support" / "tiny.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without slots and a worker node."""
    cluster = start_head(num_cpus=0)
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def connection(cluster: Cluster) -> Iterator[None]:
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.full("starts a cluster of two nodes")
def test_every_node_is_checked(
    cluster: Cluster,
    connection: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
    labels = [node.label for node in list_nodes()]
    overrides = [f"storage.root={tmp_path / 'run'}", "execution=ray"]
    assert main(["doctor", str(TINY), *overrides, "--json"]) == DONE
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert list(groups) == ["cluster", *(f"node {label}" for label in labels)]
    of_cluster = statuses(groups["cluster"])
    assert of_cluster.keys() == {
        "Ray",
        "authentication",
        "versions",
        "clocks",
        "network",
        "resources",
        "shared storage",
    }
    for check in ("Ray", "versions", "clocks", "network", "resources", "shared storage"):
        assert of_cluster[check] == "ok", groups["cluster"]
    for label in labels:
        of_node = statuses(groups[f"node {label}"])
        for check in ("Python", "packages", "DeepSpeed", "NCCL and gloo", "storage access"):
            assert of_node[check] == "ok", groups[f"node {label}"]
    assert list((tmp_path / "run").iterdir()) == []


def statuses(verdicts: list[dict[str, Any]]) -> dict[str, str]:
    return {verdict["check"]: verdict["status"] for verdict in verdicts}


def test_a_root_that_cannot_be_written_is_a_verdict(connection: None) -> None:
    verdict = check_shared_root("/proc/run")
    assert verdict.status == "failed"
    assert "/proc/run" in verdict.finding


def test_without_the_cluster_this_machine_is_still_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert main(["doctor"]) == FAILED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cluster"
    assert lines[1].startswith(f"  FAILED   Ray  RAY_ADDRESS: {address} does not answer")
    assert "this machine" in lines
    assert lines[-2].startswith("note: no CONFIG was given")
    assert lines[-1].endswith("failed: 1")
