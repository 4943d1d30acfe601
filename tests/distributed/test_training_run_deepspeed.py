"""`python -m fqgan_dist.training.run`: DeepSpeed and plain runs continue each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fqgan_dist.cli import main as fqgan
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "support" / "tiny.yaml"


@pytest.fixture(scope="module")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    assert fqgan(["run", str(TINY), f"storage.root={root}", "stages=[shards, teachers]"]) == 0
    return root


def torchrun(root: Path, num_ranks: int, *arguments: str) -> str:
    module = ["-m", "fqgan_dist.training.run", str(TINY), f"storage.root={root}"]
    module += ["tokenizer.training.checkpoint.retention.keep_last=9"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*launcher, f"--nproc-per-node={num_ranks}", *module, "stage=tokenizer", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def weights(root: Path, step: int) -> dict[str, Tensor]:
    loaded = CheckpointStore(Storage(root), "tokenizer/checkpoints").load_latest(step=step)
    assert loaded is not None
    return loaded.read("tokenizer")


def forget_the_last_steps(root: Path) -> None:
    """Leave the run as a kill at step 4 would: no record of the end, no checkpoint of step 6."""
    path = root / "manifests" / "tokenizer.json"
    record = json.loads(path.read_text()) | {"state": "started", "outputs": {}, "metrics": {}}
    path.write_text(json.dumps(record))
    for part in root.glob("tokenizer/checkpoints/step-00000006/*/*.safetensors"):
        part.unlink()


def test_deepspeed_and_plain_continue_each_other_s_runs(
    prepared_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(prepared_root, root)
    deepspeed = "tokenizer.training.engine=deepspeed"
    torchrun(root, 2, deepspeed, "tokenizer.training.zero_stage=1")
    first = weights(root, 6)
    forget_the_last_steps(root)
    assert "resumed at step 4 of 6" in torchrun(root, 1)
    plain = weights(root, 6)
    forget_the_last_steps(root)
    assert "resumed at step 4 of 6" in torchrun(
        root, 1, deepspeed, "tokenizer.training.zero_stage=2"
    )
    again = weights(root, 6)
    # Gradients are summed in another order; two Adam steps of 1e-3 on weights of order 0.1.
    for name, tensor in first.items():
        torch.testing.assert_close(plain[name], tensor, rtol=0, atol=5e-3)
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=5e-3)
