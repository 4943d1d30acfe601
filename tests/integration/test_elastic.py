"""A training on a cluster that grows and shrinks, 1 -> 3 -> 2: each phase is that of its own size.

Phases are held against trainings of fixed size, without Ray, from the commit that the phase began
at: at the same size all steps are equal to the bit, at another one the losses of the first step,
which are means of the micro-batches in their order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.ray_clusters import start_head
from support.records import read_records
from support.waiting import wait_until

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.commit_log import CommitLog, CommitRecord

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "support" / "tiny.yaml"
STEPS = {"autoregressive": 800, "tokenizer": 300}
"""So many that nodes can come and go in their time."""
TIMEOUT_S = 400
STARTED = re.compile(r"starting (\d) train worker\(s\) of 1 to 3")
RESUMED = re.compile(r"back at step (\d+) with (\d) train worker\(s\) after .*")
TIMES = ("time", "train/loader_wait_fraction", "train/images_per_s", "train/cache_hit_fraction")
# Sums over ranks; all else is summed in the order of micro-batches.
SUMMED_BY_RANK = ("gradient_norm",)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.full("minutes on a cluster whose nodes come and go; the choices are unit tests"),
    pytest.mark.timeout(3 * TIMEOUT_S),
]


def tell(text: str) -> None:
    """Write down what was measured, for `pytest -s`."""
    sys.stdout.write(text + "\n")


def settings(stage: str) -> list[str]:
    """A training of four micro-batches, so that one to four ranks can share a step."""
    return [
        *(f"{name}.training.micro_batch_size=2" for name in ("tokenizer", "autoregressive")),
        *("tokenizer.training.steps=4", f"{stage}.training.steps={STEPS[stage]}"),
        f"{stage}.training.schedule={{lr: 1.0e-3, kind: constant, warmup_steps: 2}}",
        f"{stage}.training.checkpoint={{every: 50, retention: {{keep_last: 999}}}}",
        f"{stage}.training.evaluate_every=1000",
    ]


def command(root: Path, *options: str) -> list[str]:
    return ["-m", "fqgan_dist.cli", "run", str(TINY), f"storage.root={root}", *options]


def call(*arguments: str) -> str:
    """Run a Python command to its end and give its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def commits(root: Path, stage: str) -> list[CommitRecord]:
    log = CommitLog(Storage(root / stage / "checkpoints"))
    records = [log.read(number) for number in log.numbers()]
    return [record for record in records if isinstance(record, CommitRecord)]


def losses(root: Path, stage: str) -> dict[int, dict[str, float]]:
    """Give what each step recorded and does not depend on the clock."""
    return {
        int(record["step"]): {
            name: value
            for name, value in record.items()
            if name not in TIMES and not name.startswith("train/") and "_per_s" not in name
        }
        for record in read_records(root / stage / "metrics.jsonl")
        if f"{stage}/loss/total" in record
    }


@dataclass(frozen=True)
class Elastic:
    """A finished run of three sizes."""

    root: Path
    log: str
    resumed: list[tuple[int, int]]
    """Of each resize: the step after its commit, and the new size."""


def run_elastic(root: Path, stage: str, log: Path) -> Elastic:
    """Train a stage on a cluster: of one node, of two more soon, and of one less after a commit."""
    options = (
        *("execution=ray", f"stages=[{stage}]", "ray.train.num_workers=[1,3]"),
        *("ray.train.custom={spot: 1}", "ray.train.size_wait_s=5", "ray.train.grow_after_s=6"),
    )
    cluster = start_head(num_cpus=1)
    process = None
    try:
        cluster.add_node(num_cpus=1, resources={"spot": 1})
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command(root, *settings(stage), *options)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": str(cluster.address)},
                stdout=file,
                stderr=file,
            )
        running = process

        def wait_for(is_true: Any) -> None:
            wait_until(lambda: is_true() or running.poll() is not None)
            assert running.poll() is None, log.read_text()[-6000:]

        wait_for(lambda: STARTED.search(log.read_text()))
        added = [cluster.add_node(num_cpus=1, resources={"spot": 1}) for _ in range(2)]
        wait_for(lambda: "with 3 train worker(s)" in log.read_text())
        known = len(commits(root, stage))
        wait_for(lambda: len(commits(root, stage)) > known + 1)
        cluster.remove_node(added[-1], allow_graceful=False)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()[-6000:]
    finally:
        if process is not None:
            process.kill()
            process.wait()
        cluster.shutdown()
    text = log.read_text()
    resumed = [(int(found[1]), int(found[2])) for found in RESUMED.finditer(text)]
    return Elastic(root, text, resumed)


def train_fixed(source: Path, root: Path, stage: str, *, step: int, size: int, steps: int) -> None:
    """Train on with so many ranks from a step's commit of another run to a step, without Ray."""
    ignored = shutil.ignore_patterns("logs", "sessions", f"{stage}.json", "summary.json")
    shutil.copytree(source, root, ignore=ignored)
    last = max((each.number for each in commits(root, stage) if each.step <= step), default=0)
    for path in (root / stage / "checkpoints" / "commits").iterdir():
        if int(path.stem) > last:
            path.unlink()
    if not last:
        shutil.rmtree(root / stage, ignore_errors=True)
    module = ["-m", "fqgan_dist.training.run", str(TINY), f"storage.root={root}"]
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    call(
        *(ranks if size > 1 else []),
        *module,
        f"stage={stage}",
        *settings(stage),
        f"{stage}.training.steps={steps}",
    )


@pytest.mark.parametrize("stage", ["autoregressive", "tokenizer"])
def test_a_training_grows_and_shrinks_with_its_cluster(stage: str, tmp_path: Path) -> None:
    root, steps = tmp_path / "run", STEPS[stage]
    before = {
        "autoregressive": "shards, teachers, tokenizer, codes",
        "tokenizer": "shards, teachers",
    }
    call(*command(root, *settings(stage), f"stages=[{before[stage]}]"))
    elastic = run_elastic(root, stage, tmp_path / "log")
    tell("\n".join(line for line in elastic.log.splitlines() if "train worker" in line))
    assert [int(found[1]) for found in STARTED.finditer(elastic.log)] == [1, 3, 2], elastic.log
    assert [size for _, size in elastic.resumed] == [3, 2]
    (grown, _), (shrunk, _) = elastic.resumed
    assert elastic.log.count("resize from 1 to 3 train workers") >= 1
    by_step = {each.step: each for each in commits(root, stage)}
    assert grown - 1 in by_step
    assert shrunk - 1 in by_step

    ledger = call(
        *("-m", "fqgan_dist.cli", "checkpoints", "verify", str(TINY), stage),
        *(f"storage.root={root}", "ledger=true", *settings(stage)),
    )
    tell(ledger)

    ours = losses(root, stage)
    assert list(ours) == list(range(1, steps + 1))
    for name, first, last, size, until in (
        ("alone", 1, grown - 1, 1, steps),
        ("three", grown, shrunk - 1, 3, shrunk),
        ("two", shrunk, steps, 2, steps),
    ):
        train_fixed(root, tmp_path / name, stage, step=first - 1, size=size, steps=until)
        fixed = losses(tmp_path / name, stage)
        assert {step: fixed[step] for step in range(first, last + 1)} == {
            step: ours[step] for step in range(first, last + 1)
        }, name
        if last < steps:  # the first step of the next phase, from the same commit
            drop = [key for key in ours[last + 1] if key.endswith(SUMMED_BY_RANK)]
            of_other_size = dict(fixed[last + 1])
            of_this = dict(ours[last + 1])
            for key in drop:
                assert of_other_size.pop(key) == pytest.approx(of_this.pop(key), rel=1e-4)
            assert of_other_size == of_this
    assert weights(root, stage) == weights(tmp_path / "two", stage)
    if stage == "autoregressive":
        calm = losses(tmp_path / "alone", stage)
        total = f"{stage}/loss/total"
        gap = max(abs(calm[step][total] - ours[step][total]) for step in ours)
        tell(f"largest difference from the run of one worker: {gap:.2e}")
        assert gap < 1e-5


def weights(root: Path, stage: str) -> Any:
    return json.loads((root / "manifests" / f"{stage}.json").read_text())["outputs"]
