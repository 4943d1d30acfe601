"""Runs submitted as jobs to a real Ray cluster with token authentication, as users submit them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ray_clusters import NodeSpec, RayCluster, run_ray_cluster
from support.waiting import wait_until

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
SUBMIT = Path(__file__).parents[2] / "cluster" / "submit"
STEPS = 30
TRAINING = [
    "execution=ray",
    "ray.train.num_workers=2",
    f"tokenizer.training.steps={STEPS}",
    "tokenizer.training.engine=deepspeed",
    "autoregressive.training.engine=deepspeed",
    "autoregressive.training.zero_stage=3",
]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


A_WHOLE_PIPELINE = pytest.mark.full("whole pipelines as jobs; small jobs and other kills are tried")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with run_ray_cluster([NodeSpec(num_cpus=2)]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def finished_run(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run") / "root"
    done = cluster.submit(*command(root), timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def command(root: Path) -> list[str]:
    return ["fqgan", "run", str(TINY), f"storage.root={root}", *TRAINING]


def metrics(root: Path) -> dict[str, Any]:
    summary = json.loads((root / "summary.json").read_text(encoding="utf-8"))
    assert {stage["state"] for stage in summary.values()} == {"done"}
    return {name: stage["metrics"] for name, stage in summary.items()}


def files(root: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in root.rglob("*") if path.is_file()}


def wait_for_metrics(root: Path, *, step: int) -> None:
    path = root / "tokenizer" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        time.sleep(0.05)
    pytest.fail(f"no step {step} in {path}")


def find_driver(root: Path) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended
        if f"storage.root={root}" in words and any(word.endswith("/fqgan") for word in words):
            return int(path.parent.name)
    pytest.fail("no driver process")


def find_train_worker(cluster: RayCluster) -> int:
    """Find one of this cluster's train workers; other clusters may run on this machine."""
    folder = str(cluster.folder).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_worker = path.read_bytes().startswith(b"ray::RayTrainWorker")
            if is_worker and folder in (path.parent / "environ").read_bytes():
                return int(path.parent.name)
        except OSError:
            continue  # it has ended
    pytest.fail("no train worker")


def wait_for_last_job(cluster: RayCluster) -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        status = cluster.list_jobs()[-1]["status"]
        if status not in ("PENDING", "RUNNING"):
            return status
        time.sleep(0.5)
    return "no end"


def test_a_job_without_the_token_is_refused(cluster: RayCluster) -> None:
    before = len(cluster.list_jobs())
    refused = cluster.submit("fqgan", "--help", with_token=False)
    assert refused.returncode != 0
    assert "token" in refused.stdout + refused.stderr
    assert len(cluster.list_jobs()) == before


@pytest.mark.full(
    "whole pipelines as jobs; kills and resumption are proven without Ray, jobs by small ones"
)
def test_the_same_job_again_does_nothing_and_says_so(
    cluster: RayCluster, finished_run: Path
) -> None:
    before = files(finished_run)
    again = cluster.submit(*command(finished_run))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nothing to do: every stage of this run is done already" in again.stdout
    # The driver's own log is all that the second job may have touched.
    after = files(finished_run)
    changed = {path for path in after if after[path] != before.get(path)}
    assert before.keys() <= after.keys()
    assert {Path(path).parent.name for path in changed} <= {"logs"}


@pytest.mark.full(
    "whole pipelines as jobs; kills and resumption are proven without Ray, jobs by small ones"
)
def test_a_killed_driver_is_resumed_to_the_same_bits(
    cluster: RayCluster, finished_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    submitted = cluster.submit(*command(root), wait=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for_metrics(root, step=STEPS // 2)
    os.kill(find_driver(root), signal.SIGKILL)
    resumed = cluster.submit(*command(root), timeout_s=600)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed at step" in resumed.stdout
    assert metrics(root) == metrics(finished_run)


@pytest.mark.full(
    "whole pipelines as jobs; kills and resumption are proven without Ray, jobs by small ones"
)
def test_a_killed_train_worker_is_replaced_and_the_run_ends_with_the_same_bits(
    cluster: RayCluster, finished_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    stages = "stages=[shards, teachers, tokenizer]"
    submitted = cluster.submit(*command(root), stages, wait=False)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for_metrics(root, step=STEPS // 2)
    os.kill(find_train_worker(cluster), signal.SIGKILL)
    assert wait_for_last_job(cluster) == "SUCCEEDED"
    log = "".join(path.read_text(encoding="utf-8") for path in (root / "logs").glob("run-*.log"))
    assert log.count("starting again from the newest checkpoint in 5 s (patience.losses_s: ") == 1
    expected = metrics(finished_run)["tokenizer"]
    found = metrics(root)["tokenizer"]
    assert {"discriminator_loss", "training_usage"} <= found.keys()
    assert found == {name: expected[name] for name in found}


def test_a_wrong_setting_fails_the_job_with_its_cause(cluster: RayCluster, tmp_path: Path) -> None:
    wrong = cluster.submit(*command(tmp_path / "root"), "tokenizer.training.stepz=3")
    assert wrong.returncode != 0
    assert "did you mean 'steps'" in wrong.stdout


@pytest.mark.full("a job; test_ray_driver refuses it without one")
def test_a_relative_root_is_refused_in_a_job_with_a_working_directory(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_bytes(TINY.read_bytes())
    done = cluster.submit(
        "fqgan", "run", "tiny.yaml", "execution=ray", working_dir=tmp_path, timeout_s=120
    )
    assert done.returncode != 0
    assert "storage.root" in done.stdout
    assert "working directory" in done.stdout


def start_submit(
    cluster: RayCluster, *arguments: str, with_token: bool = True
) -> subprocess.Popen[str]:
    """Start `cluster/submit` as a user on another machine does."""
    return subprocess.Popen(
        [sys.executable, str(SUBMIT), f"address={cluster.dashboard}", "poll_s=0.2", *arguments],
        env=cluster.environment(with_token=with_token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_submit_brings_a_job_to_its_end_although_its_driver_is_killed(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "word").write_text("sent along")
    pids = tmp_path / "pids"
    script = f"cat word; echo; echo $$ >> {pids}; [ $(wc -l < {pids}) = 2 ] || sleep 600; exit 3"
    arguments = ["run=killed", f"working_dir={tmp_path}", "--", "sh", "-c", script]
    with start_submit(cluster, *arguments) as submit:
        wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"))
        os.kill(int(pids.read_text()), signal.SIGKILL)
        output, errors = submit.communicate(timeout=120)
    assert submit.returncode == 3, errors
    # Not by lines: Ray appends its own, and may come between a word and the end of its line.
    assert output.count("sent along") == 2, "once for each of the two jobs"
    assert "its driver was killed (exit code" in errors
    assert "its command failed with exit code 3" in errors


def test_submit_without_the_token_is_refused(cluster: RayCluster) -> None:
    before = len(cluster.list_jobs())
    with start_submit(cluster, "run=refused", "--", "true", with_token=False) as submit:
        _, errors = submit.communicate(timeout=60)
    assert submit.returncode == 2
    assert "the cluster refuses us" in errors
    assert len(cluster.list_jobs()) == before
