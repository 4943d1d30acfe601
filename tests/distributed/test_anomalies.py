"""Two ranks of which one meets a loss that is not finite: both do what the policy says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fqgan_dist.cli import main as fqgan
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "support" / "tiny.yaml"
SCRIPT = ROOT / "tests" / "support" / "sick_runs.py"

pytestmark = pytest.mark.full("trains; each policy is shown with a toy in unit/training")


@pytest.fixture(scope="module")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    stages = "stages=[shards, teachers, tokenizer, codes]"
    assert fqgan(["run", str(TINY), f"storage.root={root}", stages]) == 0
    return root


def run_sick(
    prepared: Path, root: Path, stage: str, *options: str, ranks: int = 2, step: int = 5
) -> subprocess.CompletedProcess[str]:
    """Train a stage whose step meets an infinite loss in micro-batch 1, which is rank 1's."""
    shutil.copytree(prepared, root)
    shutil.rmtree(root / stage, ignore_errors=True)
    (root / "manifests" / f"{stage}.json").unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arguments = [str(step), "1", str(TINY), f"storage.root={root}", f"stage={stage}", *options]
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def open_store(root: Path, stage: str) -> CheckpointStore:
    return CheckpointStore(Storage(root), f"{stage}/checkpoints")


def weights(root: Path, stage: str) -> dict[str, torch.Tensor]:
    loaded = open_store(root, stage).load_latest(step=6)
    assert loaded is not None
    return loaded.read(stage)


def skipped(root: Path, stage: str) -> Sequence[int]:
    store = open_store(root, stage)
    assert store.check_ledger(lambda _: None).problems == []
    found = [commit.consumed for commit in store.list_commits()]
    return [each.step for consumed in found if consumed for each in consumed.skipped]


@pytest.mark.parametrize("stage", ["tokenizer", "autoregressive"])
def test_both_ranks_skip_or_go_back_alike(prepared_root: Path, tmp_path: Path, stage: str) -> None:
    key = f"{stage}.training.anomalies.on_not_finite"
    skip, back = tmp_path / "skip", tmp_path / "back"
    for root, answer in ((skip, "skip"), (back, "rollback")):
        done = run_sick(prepared_root, root, stage, f"{key}={answer}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"step 5: {stage}/loss/" in done.stderr
        assert "micro-batch 1 (rank 1): images " in done.stderr
        assert skipped(root, stage) == [5]
    assert "going back to the checkpoint of step 4" in done.stderr
    one, other = weights(skip, stage), weights(back, stage)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    lines = (back / stage / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps)
    assert max(json.loads(line).get("train/rollbacks", 0) for line in lines) == 1


def test_a_stop_names_the_images_and_no_checkpoint_that_is_not_there(
    prepared_root: Path, tmp_path: Path
) -> None:
    option = "tokenizer.training.anomalies.on_not_finite=stop"
    done = run_sick(prepared_root, tmp_path / "stop", "tokenizer", option, step=2)
    assert done.returncode != 0
    assert "NumericsError: step 2: tokenizer/loss/total" in done.stderr
    assert "there is no checkpoint yet" in done.stderr
