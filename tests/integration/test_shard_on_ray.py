"""`fqgan-data shard engine=ray`: the same bytes as by processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster

from data_tools.cli import main
from fqgan_dist.storage.storage import Storage

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with two CPU slots."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 small images of two classes, and one that is none."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for number in range(24):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (root / "class0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


def read_files(folder: Path) -> dict[str, bytes]:
    storage = Storage(folder)
    return {name: storage.read_bytes(name) for name in storage.list()}


def test_actors_make_the_same_dataset_as_processes(
    cluster: Cluster, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["name=x", "split=train", "samples_per_shard=4"]
    assert main(["shard", str(images), str(tmp_path / "here"), *settings, "workers=1"]) == 0
    by_actors = ["shard", str(images), str(tmp_path / "there"), *settings, "engine=ray"]
    capsys.readouterr()
    assert main([*by_actors, "workers=2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert read_files(tmp_path / "there") == read_files(tmp_path / "here")
    assert (summary["num_built"], summary["num_images"], summary["num_problems"]) == (7, 25, 1)
    assert main(by_actors) == 0
    assert "complete already" in capsys.readouterr().out


def test_an_attached_cluster_needs_a_source_that_all_nodes_read(
    cluster: Cluster, images: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    arguments = ["shard", str(images), str(tmp_path / "out"), "name=x", "split=train"]
    assert main([*arguments, "engine=ray"]) == 1
    assert "expected one that all nodes of the cluster read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "engine=ray", "is_shared=true"]) == 0
