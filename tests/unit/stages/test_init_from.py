"""A training that starts from exported weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fqgan_dist.cli import DONE, FAILED, main
from fqgan_dist.config import load_config
from fqgan_dist.errors import DataError
from fqgan_dist.stages.autoregressive import AutoregressiveStage
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.run import open_run
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.tokenizer import TokenizerStage, TrainedTokenizer
from fqgan_dist.weights.files import load_safetensors_checked
from fqgan_dist.world import World

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained both models, and exported them beside it."""
    root = tmp_path_factory.mktemp("trained")
    assert run(root, "stages=[shards, teachers, tokenizer, codes, autoregressive]") == DONE
    for stage in ("tokenizer", "autoregressive"):
        target = f"to={root / 'exports' / f'{stage}.safetensors'}"
        arguments = ["checkpoints", "export", str(TINY), stage, f"storage.root={root}", target]
        assert main(arguments) == DONE
    return root


def run(root: Path, *arguments: str) -> int:
    return main(["run", str(TINY), f"storage.root={root}", *arguments])


def init_from(root: Path, stage: str, *, weights_of: str | None = None) -> str:
    return f"{stage}.init_from={{source: {root}/exports/{weights_of or stage}.safetensors}}"


def open_with(root: Path, *overrides: str) -> RunContext:
    return open_run(load_config(TINY, [f"storage.root={root}", *overrides], RunConfig), World())


def test_the_tokenizer_starts_from_the_exported_weights(root: Path) -> None:
    task = TokenizerStage(open_with(root, init_from(root, "tokenizer"))).build_task()
    exported = load_safetensors_checked(root / "exports" / "tokenizer.safetensors")
    drawn = TokenizerStage(open_with(root)).build_task().engine.module.state_dict()
    found = task.engine.module.state_dict()
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)
    assert not all(torch.equal(found[name], drawn[name]) for name in found)


def test_the_generator_starts_from_the_exported_weights(root: Path) -> None:
    task = AutoregressiveStage(open_with(root, init_from(root, "autoregressive"))).build_task()
    exported = load_safetensors_checked(root / "exports" / "autoregressive.safetensors")
    found = task.engine.module.state_dict()
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)


def test_weights_of_another_architecture_are_refused_with_what_differs(root: Path) -> None:
    larger = open_with(root, init_from(root, "tokenizer"), "tokenizer.model.codebook_size=64")
    with pytest.raises(DataError, match=r"tokenizer\.init_from: .*another shape .*is \(32, 4\)"):
        TokenizerStage(larger).build_task()
    other = open_with(root, init_from(root, "autoregressive", weights_of="tokenizer"))
    with pytest.raises(DataError, match=r"autoregressive\.init_from: .*tensors are missing"):
        AutoregressiveStage(other).build_task()


def test_where_a_training_started_is_part_of_its_record(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, init_from(root, "tokenizer"), "stages=[tokenizer]") == FAILED
    assert "settings.init_from.source: new, now" in capsys.readouterr().err


def test_a_run_that_starts_from_weights_trains_from_step_0(root: Path, tmp_path: Path) -> None:
    stages = "stages=[shards, teachers, tokenizer]"
    assert run(tmp_path, init_from(root, "tokenizer"), stages) == DONE
    started = open_with(tmp_path, init_from(root, "tokenizer")).read(TrainedTokenizer)
    drawn = open_with(root).read(TrainedTokenizer)
    assert started.step == drawn.step == 6
    assert started.weights != drawn.weights
