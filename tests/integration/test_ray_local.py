"""`fqgan run` on a Ray that it starts for itself, and what stops it before or in training."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fqgan_dist.orchestration.cluster import connected_cluster
from fqgan_dist.orchestration.config import RayConfig

FQGAN = Path(sys.executable).with_name("fqgan")
TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def run(root: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [str(FQGAN), "run", str(TINY), "execution=ray", f"storage.root={root}", *settings]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_more_workers_than_this_machine_has_slots_are_refused_at_once(tmp_path: Path) -> None:
    done = run(tmp_path / "root", "ray.train.num_workers=2", "ray.local_cpus=1")
    assert done.returncode == 1
    assert "2 train workers: needed are 2 CPU (has 1)" in done.stderr
    assert not (tmp_path / "root" / "manifests").exists()


@pytest.mark.full("trains on Ray; causes and retries are told apart in test_observability_on_ray")
def test_a_loss_that_is_not_finite_ends_the_run_with_its_cause_and_no_retry(tmp_path: Path) -> None:
    done = run(
        tmp_path / "root",
        "stages=[shards, teachers, tokenizer]",
        "ray.train.num_workers=2",
        "ray.local_cpus=2",
        "tokenizer.training.engine=deepspeed",
        "tokenizer.training.schedule.lr=1e30",
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("NumericsError: [rank ")
    assert "not finite" in last
    assert "starting again" not in done.stderr


def test_the_folder_of_a_ray_started_here_is_private_and_goes_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not pytest's folder, whose path leaves no room for sockets.
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        monkeypatch.setenv("RAY_TMPDIR", base)
        with connected_cluster(RayConfig(local_cpus=1)):
            (folder,) = Path(base).iterdir()
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert list(folder.glob("*/session_*/sockets/plasma_store"))
        assert list(Path(base).iterdir()) == []
