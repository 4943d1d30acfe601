"""`python -m fqgan_dist.training.run`, alone and under torchrun, without Ray and DeepSpeed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.synthetic_shards import flip_byte
from support.waiting import wait_until

from fqgan_dist.cli import main as fqgan
from fqgan_dist.config import load_config
from fqgan_dist.data.index import load_index, load_samples
from fqgan_dist.errors import FAILED
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.run import DONE, WRONG_USAGE, main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "support" / "tiny.yaml"

FAIL_ON_RANK_1 = """
import sys
import torch.distributed as dist
from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.train import join_ranks
from fqgan_dist.world import World

world = World.from_environment()
try:
    with join_ranks(load_config(sys.argv[1], ["device=cpu"], RunConfig), world):
        dist.barrier()
        if world.rank == 1:
            raise RuntimeError("rank 1 fails")
except RuntimeError:
    assert world.rank == 1
# With NCCL, to destroy the group would be to wait for ranks that wait for this one.
assert dist.is_initialized() == (world.rank == 1)
"""

HIDE_AND_RUN = """
import sys
sys.modules["ray"] = sys.modules["deepspeed"] = None  # imports of these fail
from fqgan_dist.training.run import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def prepared_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    assert fqgan(["run", str(TINY), f"storage.root={root}", "stages=[shards, teachers]"]) == DONE
    return root


@pytest.fixture
def root(prepared_root: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(prepared_root, copy)
    return copy


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def torchrun(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    module = ["-m", "fqgan_dist.training.run", str(TINY), f"storage.root={root}", *arguments]
    return launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *module)


def record_of(root: Path, stage: str) -> dict[str, object]:
    return json.loads((root / "manifests" / f"{stage}.json").read_text())


def last_weights(root: Path) -> dict[str, torch.Tensor]:
    loaded = CheckpointStore(Storage(root), "tokenizer/checkpoints").load_latest(step=6)
    assert loaded is not None
    return loaded.read("tokenizer")


@pytest.mark.full("torchrun; two ranks continue a process and are continued always")
def test_two_ranks_train_a_stage_and_fqgan_run_takes_it_as_done(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = torchrun(root, "stage=tokenizer")
    assert result.returncode == DONE, result.stderr
    record = record_of(root, "tokenizer")
    assert record["state"] == "done"
    assert json.loads((root / "summary.json").read_text())["tokenizer"]["state"] == "done"
    assert list((root / "logs").glob("*rank-00001-*.log"))
    lines = (root / "tokenizer" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    with caplog.at_level(logging.INFO):
        assert fqgan(["run", str(TINY), f"storage.root={root}", "stages=[tokenizer]"]) == DONE
    assert "tokenizer: already done from the same inputs, skipped" in caplog.text
    assert record_of(root, "tokenizer") == record


def damage_every_fourth_image(root: Path) -> None:
    storage = Storage(root).child("data/photographs/train")
    for entry in load_index(storage).shards:
        table = load_samples(storage, entry)
        for row in range(0, len(table), 4):
            flip_byte(storage, entry.file, int(table.offsets[row]))


def test_two_ranks_continue_what_one_process_began(root: Path) -> None:
    damage_every_fourth_image(root)
    # As after a kill at step 4: no record of the end, no checkpoint of step 6.
    assert main([str(TINY), f"storage.root={root}", "stage=tokenizer"]) == DONE
    alone = last_weights(root)
    record = record_of(root, "tokenizer") | {"state": "started", "outputs": {}, "metrics": {}}
    (root / "manifests" / "tokenizer.json").write_text(json.dumps(record))
    for part in root.glob("tokenizer/checkpoints/step-00000006/*/*.safetensors"):
        part.unlink()
    ledger = (root / "tokenizer" / "damaged_samples.jsonl").read_text()
    slots = {record["slot"]: record["step"] for record in map(json.loads, ledger.splitlines())}
    assert list(slots) == sorted(slots)
    assert {5, 6} <= set(slots.values())
    result = torchrun(root, "stage=tokenizer")
    assert result.returncode == DONE, result.stderr
    assert "resumed at step 4 of 6" in result.stderr
    # Both ranks' damaged samples, replaced by the same ones, once and in the order of slots.
    assert (root / "tokenizer" / "damaged_samples.jsonl").read_text() == ledger
    together = last_weights(root)
    # Gradients are summed in another order; two Adam steps of 1e-3 on weights of order 0.1.
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=5e-3)


def test_it_runs_without_ray_and_deepspeed(root: Path) -> None:
    result = launch("-c", HIDE_AND_RUN, str(TINY), f"storage.root={root}", "stage=tokenizer")
    assert result.returncode == DONE, result.stderr
    assert record_of(root, "tokenizer")["state"] == "done"


def test_a_metric_sink_that_fails_does_not_stop_training(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://to-be-found")
    arguments = [str(TINY), f"storage.root={root}", "stage=tokenizer", "telemetry.sinks=[mlflow]"]
    assert main(arguments) == DONE
    assert caplog.text.count("telemetry.sinks: 'mlflow' has failed and is left out") == 1
    assert "nowhere" in caplog.text
    lines = (root / "tokenizer" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    assert not (root / "tokenizer" / "tensorboard").exists()


def test_an_error_under_torchrun_names_its_rank_and_marks_nothing_done(root: Path) -> None:
    result = torchrun(root, "stage=autoregressive")
    assert result.returncode != DONE
    assert "[rank 0/2 node0]" in result.stderr
    assert "stage 'codes' has not finished" in result.stderr
    assert not (root / "manifests" / "autoregressive.json").exists()


def test_a_rank_that_failed_does_not_wait_for_the_others_to_leave_the_group(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text(FAIL_ON_RANK_1)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = launch(*command, str(script), str(TINY))
    assert result.returncode == DONE, result.stderr


@pytest.mark.parametrize(
    "num_ranks",
    [pytest.param(1, marks=pytest.mark.full("torchrun; two ranks are tried always")), 2],
)
def test_sigterm_ends_all_ranks_after_a_save(root: Path, num_ranks: int) -> None:
    command = [sys.executable]
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command += launcher
    process = subprocess.Popen(
        [
            *(*command, "-m", "fqgan_dist.training.run", str(TINY), "stage=tokenizer"),
            *(f"storage.root={root}", "tokenizer.training.steps=100000"),
            "tokenizer.training.checkpoint.every=10",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    try:
        commit = root / "tokenizer" / "checkpoints" / "commits" / "0000000002.json"
        wait_until(lambda: commit.exists() or process.poll() is not None)
        process.terminate()
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    # torchrun has its own code, and a traceback for the signal that it got.
    assert process.returncode == (143 if num_ranks == 1 else 1), said
    assert said.count("ERROR   terminated; the same command continues") == num_ranks, said
    loaded = CheckpointStore(Storage(root), "tokenizer/checkpoints").load_latest()
    assert loaded is not None
    (records,) = (root / "tokenizer" / "sessions").glob("*/metrics.jsonl")
    assert json.loads(records.read_text().splitlines()[-1])["step"] == loaded.step


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stage=tokenizer"], WRONG_USAGE, "name no config file"),
        ([str(TINY)], WRONG_USAGE, "exactly one must be named"),
        ([str(TINY), "stage=codes"], WRONG_USAGE, "stage=tokenizer|autoregressive"),
        ([str(TINY), "stage=tokenizer", "nmae=x"], WRONG_USAGE, "did you mean 'name'?"),
        ([str(TINY), "stage=tokenizer"], FAILED, "stage 'shards' has not finished"),
    ],
)
def test_wrong_usage_is_explained(
    arguments: Sequence[str],
    code: int,
    message: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides = [f"storage.root={tmp_path / 'run'}"] if str(TINY) in arguments else []
    assert main([*arguments, *overrides]) == code
    assert message in caplog.text


def test_the_test_config_trains_in_two_micro_batches() -> None:
    # Two ranks need two.
    config = load_config(TINY, [], RunConfig)
    assert config.tokenizer.training.micro_batches_per_step == 2
