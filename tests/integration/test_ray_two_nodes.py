"""Runs on two Ray nodes that share nothing but the network and an object store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.radosgw import ACCESS_KEY, S3_BUCKET, SECRET_KEY
from support.ray_clusters import (
    NodeSpec,
    RayCluster,
    can_separate_file_systems,
    run_ray_cluster,
)

from fqgan_dist.storage.storage import Storage

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "support" / "tiny.yaml"
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@contextmanager
def two_nodes(*private: Path) -> Iterator[RayCluster]:
    """Run a head and a second node, of one CPU each; `private` are folders of the second alone."""
    nodes = [NodeSpec(num_cpus=1), NodeSpec(num_cpus=1, private_folders=private)]
    with run_ray_cluster(nodes) as cluster:
        yield cluster


def read_tree(storage: Storage, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """Read every object below a prefix."""
    for name in storage.list(prefix):
        path = f"{prefix}/{name}" if prefix else name
        try:
            yield path, storage.read_bytes(path)
        except FileNotFoundError:
            yield from read_tree(storage, path)


def find_credentials(named: Iterator[tuple[str, bytes]]) -> list[str]:
    secrets = (SECRET_KEY.encode(), ACCESS_KEY.encode())
    return [name for name, data in named if any(secret in data for secret in secrets)]


def run_on_s3(
    cluster: RayCluster, config: Path, root: str, *settings: str, timeout_s: float
) -> dict[str, Any]:
    """Submit a run, look for credentials in all that it left, and return its summary."""
    done = cluster.submit(
        "fqgan", "run", str(config), "execution=ray", f"storage.root={root}", *settings,
        timeout_s=timeout_s,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    storage = Storage(root)
    objects = dict(read_tree(storage))
    assert {"config.yaml", "environment.json", "report.html", "summary.json"} <= objects.keys()
    assert any(path.startswith("manifests/") for path in objects)
    assert any(path.startswith("logs/") for path in objects)
    assert find_credentials(iter(objects.items())) == []
    logs = ((str(path), path.read_bytes()) for path in cluster.log_files())
    assert find_credentials(logs) == []
    assert find_credentials(iter([("output of the job", output.encode())])) == []
    return json.loads(objects["summary.json"])


@pytest.mark.full("a pipeline on two nodes; one on S3 and one on Ray run always")
def test_the_pipeline_runs_on_object_storage_and_leaks_no_credentials(
    s3_credentials: None,
) -> None:
    root = f"s3://{S3_BUCKET}/two-nodes"
    settings = ["ray.train.num_workers=2", "tokenizer.training.engine=deepspeed"]
    pools = [f"ray.pools.{name}.max_actors=2" for name in ("teachers", "codes", "evaluation")]
    with two_nodes() as cluster:
        summary = run_on_s3(cluster, TINY, root, *settings, *pools, timeout_s=600)
        assert {stage["state"] for stage in summary.values()} == {"done"}
        # With one CPU each, the two train workers were on two nodes.
        assert len(cluster.log_files("worker-*-*.err")) > 2


@pytest.mark.full("a quickstart; `make quickstart` runs it without object storage")
@pytest.mark.timeout(3600)
def test_the_whole_quickstart_runs_on_object_storage(s3_credentials: None, tmp_path: Path) -> None:
    root = f"s3://{S3_BUCKET}/quickstart"
    with two_nodes() as cluster:
        summary = run_on_s3(cluster, QUICKSTART, root, timeout_s=3600)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary), encoding="utf-8")
    targets = [sys.executable, str(ROOT / "tests" / "support" / "quickstart_targets.py")]
    subprocess.run([*targets, str(path)], check=True)


@pytest.mark.full("starts a cluster of two nodes")
def test_a_local_root_that_one_node_does_not_see_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    if not can_separate_file_systems():
        pytest.skip("no mount namespaces for this user: separate file systems are untested")
    folder = tmp_path / "data"
    folder.mkdir()
    with two_nodes(folder) as cluster:
        refused = cluster.submit(
            "fqgan", "run", str(TINY), "execution=ray", f"storage.root={folder / 'run'}"
        )
    assert refused.returncode != 0
    assert "1 of 2 nodes cannot use the storage root; nothing was started" in refused.stdout
    assert "not seen on this node" in refused.stdout
    left = [name for _, folders, files in os.walk(folder / "run") for name in (*folders, *files)]
    assert all(name == "logs" or name.endswith(".log") for name in left), left
