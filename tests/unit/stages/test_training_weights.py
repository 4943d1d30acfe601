"""What builds on a training reads its weights, and nothing else of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.counted_reads import CountedReads, count_reads
from support.tiny_tasks import load_tiny
from torch import Tensor, nn

from fqgan_dist.errors import CheckpointError
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.training import checkpoint_store, hash_weights, load_weights
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.weights.tensors import hash_tensors
from fqgan_dist.world import World

STAGE = "tokenizer"


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunContext, CountedReads]:
    config = load_tiny(f"storage.root={tmp_path}")
    storage, counted = count_reads(tmp_path)
    device = torch.device("cpu")
    context = RunContext(config=config, storage=storage, world=World(), device=device)
    return context, counted


def module(step: int) -> nn.Module:
    norm = nn.BatchNorm1d(3)
    nn.init.constant_(norm.weight, step)
    nn.init.constant_(norm.bias, step)
    norm.running_mean.fill_(step)  # pyright: ignore[reportOptionalMemberAccess] it has one
    return norm


def save(context: RunContext, training: TrainingConfig, *, has_average: bool) -> None:
    with checkpoint_store(context, STAGE, training).begin_attempt() as attempt:
        for step in (1, 2):
            weights: Mapping[str, Tensor] = module(step).state_dict()
            averages = {name: weights[name] + 10 for name in ("weight", "bias")}
            moments = {f"{name}.exp_avg": torch.zeros(1000) for name in averages}
            parts = {STAGE: weights, f"{STAGE}_optimizer": moments}
            if has_average:
                parts |= {f"{STAGE}_ema": averages}
            attempt.save(step, tensors=parts, state={}, metrics={}, config={}, dataset_id="d")


@pytest.mark.parametrize("has_average", [True, False])
def test_weights_are_loaded_and_hashed_without_the_optimizer_s_state(
    run: tuple[RunContext, CountedReads], has_average: bool, tmp_path: Path
) -> None:
    context, counted = run
    decay = 0.5 if has_average else None
    training = context.config.tokenizer.training.model_copy(update={"ema_decay": decay})
    save(context, training, has_average=has_average)
    for path in tmp_path.glob("tokenizer/checkpoints/*/*/*_optimizer*"):
        path.unlink()
    counted.reads.clear()
    loaded = module(0)
    load_weights(loaded, context, STAGE, training, 2)
    expected = module(12 if has_average else 2).state_dict() | {
        "running_mean": torch.full((3,), 2.0)
    }
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    folder = next(tmp_path.glob("tokenizer/checkpoints/step-00000002/*"))
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert 0 < counted.num_bytes() <= sum(sizes)
    part = {name: expected[name] for name in ("weight", "bias")} if has_average else expected
    assert hash_weights(context, STAGE, training, 2) == hash_tensors(part)


def test_damaged_weights_of_a_step_are_named(
    run: tuple[RunContext, CountedReads], tmp_path: Path
) -> None:
    context, _ = run
    training = context.config.tokenizer.training
    save(context, training, has_average=True)
    (path,) = tmp_path.glob("tokenizer/checkpoints/step-00000002/*/tokenizer_ema.*")
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=f"no good checkpoint of step 2; .*{path}: damaged"):
        load_weights(module(0), context, STAGE, training, 2)
    load_weights(module(0), context, STAGE, training, 1)
