"""What the driver on Ray decides before anything starts; no Ray is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.config import load_config
from fqgan_dist.errors import ClusterError, ConfigError
from fqgan_dist.orchestration.cluster import is_attached
from fqgan_dist.orchestration.ray_driver import check_room, with_absolute_root
from fqgan_dist.stages.config import RunConfig

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
TWO_SLOTS = {"CPU": 2.0}


def load(*settings: str) -> RunConfig:
    return load_config(TINY, ["execution=ray", *settings], RunConfig)


def test_what_fits_is_let_through() -> None:
    check_room(load("ray.train.num_workers=2"), TWO_SLOTS)


def test_train_workers_that_do_not_fit_are_refused() -> None:
    config = load("ray.train.num_workers=3", "ray.train.gpus=1")
    with pytest.raises(
        ClusterError, match=r"3 train workers: needed are 3 CPU \(has 2\), 3 GPU \(has 0\)"
    ):
        check_room(config, TWO_SLOTS)


def test_of_a_range_the_least_must_fit() -> None:
    check_room(load("ray.train.num_workers=[2,9]"), TWO_SLOTS)
    with pytest.raises(ClusterError, match="2 train workers: needed are 2 CPU"):
        check_room(load("ray.train.num_workers=[2,9]"), {"CPU": 1.0})


def test_pool_of_which_no_actor_fits_is_refused_as_nobody_would_bring_a_node() -> None:
    config = load("ray.pools.codes.gpus=1")
    with pytest.raises(
        ClusterError, match=r"^ray\.pools\.codes: one actor: needed are 1 GPU \(has 0\)"
    ):
        check_room(config, TWO_SLOTS)


def test_only_what_the_stages_use_must_fit() -> None:
    settings = ("ray.train.num_workers=3", "ray.pools.codes.gpus=1", "stages=[shards, teachers]")
    check_room(load(*settings), TWO_SLOTS)


@pytest.mark.parametrize(("address", "is_cluster"), [("10.0.0.1:6379", True), ("", False)])
def test_an_empty_address_names_no_cluster(
    address: str, is_cluster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert is_attached() is is_cluster


def test_a_relative_root_is_made_absolute_but_refused_in_a_jobs_copy_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.chdir(tmp_path)
    assert with_absolute_root(load("storage.root=runs/x")).storage.root == f"{tmp_path}/runs/x"
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(ConfigError, match="job's own copy of its working directory"):
        with_absolute_root(load("storage.root=runs/x"))
    for root in ("s3://bucket/x", f"{tmp_path}/x"):
        assert with_absolute_root(load(f"storage.root={root}")).storage.root == root
