"""`fqgan run` on a Ray that it starts for itself, and what stops it before or in training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    assert "restarting" not in done.stderr
