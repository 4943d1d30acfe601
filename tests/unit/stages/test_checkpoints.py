"""Checkpoints of a run: exported weights load, in our layout and in the released one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fqgan_dist.autoregressive.config import AutoregressiveConfig
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.config import load_config
from fqgan_dist.errors import CheckpointError, ConfigError
from fqgan_dist.stages.checkpoints import run_checkpoint_action
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.published import from_published_state_dict, read_published_file
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.config import CheckpointTarget

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"


def save(config: RunConfig, stage: str, model: torch.nn.Module, *, steps: tuple[int, ...]) -> None:
    """Commit checkpoints with an average that is the weights plus one."""
    store = CheckpointStore(Storage(config.storage.root), f"{stage}/checkpoints")
    attempt = store.begin_attempt()
    weights = dict(model.state_dict())
    architecture = getattr(config, stage).model
    for step in steps:
        attempt.save(
            step,
            tensors={stage: weights, f"{stage}_ema": {k: v + 1 for k, v in weights.items()}},
            state={"images_seen": 8 * step},
            metrics={f"{stage}/validation/x": 1.0 / step},
            config=architecture.model_dump(mode="json"),
            dataset_id="d" * 64,
        )
    attempt.close()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(TINY, [f"storage.root={tmp_path / 'run'}"], RunConfig)


@pytest.fixture
def tokenizer(config: RunConfig) -> FactorizedTokenizer:
    model = FactorizedTokenizer(config.tokenizer.model)
    save(config, "tokenizer", model, steps=(2, 4))
    return model


def test_export_writes_the_average_with_a_description(
    config: RunConfig, tokenizer: FactorizedTokenizer, tmp_path: Path
) -> None:
    target = CheckpointTarget(to=str(tmp_path / "out" / "weights.safetensors"))
    result = run_checkpoint_action("export", config, "tokenizer", target)
    loaded = safetensors.torch.load_file(tmp_path / "out" / "weights.safetensors")
    assert loaded.keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(loaded[k], v + 1) for k, v in tokenizer.state_dict().items())
    description = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert description == result.report
    assert (description["step"], description["is_ema"]) == (4, True)
    assert description["config"] == config.tokenizer.model.model_dump(mode="json")


def test_export_of_a_step_in_the_released_layout_loads_as_released(
    config: RunConfig, tokenizer: FactorizedTokenizer, tmp_path: Path
) -> None:
    target = CheckpointTarget(to=str(tmp_path / "released.pt"), format="published", step=2)
    run_checkpoint_action("export", config, "tokenizer", target)
    state = from_published_state_dict(
        read_published_file(tmp_path / "released.pt"), config.tokenizer.model
    )
    assert state.keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(state[k], v + 1) for k, v in tokenizer.state_dict().items())
    assert json.loads((tmp_path / "released.json").read_text())["step"] == 2


def test_a_head_that_was_never_released_has_no_released_layout(
    config: RunConfig, tmp_path: Path
) -> None:
    values = config.autoregressive.model.model_dump() | {"factor_head": {"kind": "mlp"}}
    model_config = AutoregressiveConfig.model_validate(values)
    save(config, "autoregressive", FactorizedTransformer(model_config), steps=(1,))
    target = CheckpointTarget(to=str(tmp_path / "far.pt"), format="published")
    with pytest.raises(ConfigError, match="use format=ours"):
        run_checkpoint_action("export", config, "autoregressive", target)
    assert not (tmp_path / "far.pt").exists()


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "to: required"),
        ({"to": "weights.pt"}, r"does not end in \.safetensors"),
        ({"to": "weights.safetensors", "format": "published"}, r"does not end in \.pt"),
    ],
)
def test_export_refuses_unclear_targets(
    config: RunConfig, values: dict[str, str], message: str
) -> None:
    target = CheckpointTarget.model_validate(values)
    with pytest.raises(ConfigError, match=message):
        run_checkpoint_action("export", config, "tokenizer", target)


@pytest.mark.usefixtures("tokenizer")
def test_export_replaces_no_file(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text("mine")
    target = CheckpointTarget(to=str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConfigError, match="is there already"):
        run_checkpoint_action("export", config, "tokenizer", target)


@pytest.mark.usefixtures("tokenizer")
def test_export_of_a_step_that_is_not_there_lists_the_steps(
    config: RunConfig, tmp_path: Path
) -> None:
    target = CheckpointTarget(to=str(tmp_path / "weights.safetensors"), step=3)
    with pytest.raises(CheckpointError, match="steps committed: 2, 4"):
        run_checkpoint_action("export", config, "tokenizer", target)


@pytest.mark.usefixtures("tokenizer")
def test_prune_follows_the_runs_retention(config: RunConfig, tmp_path: Path) -> None:
    override = "tokenizer.training.checkpoint.retention.keep_last=1"
    config = load_config(TINY, [f"storage.root={config.storage.root}", override], RunConfig)
    result = run_checkpoint_action("prune", config, "tokenizer")
    assert result.report == {"removed": [2], "kept": [4]}
    assert [path.name for path in (tmp_path / "run/tokenizer/checkpoints").glob("step-*")] == [
        "step-00000004"
    ]


@pytest.mark.usefixtures("tokenizer")
def test_list_names_a_checkpoint_whose_manifest_is_damaged(
    config: RunConfig, tmp_path: Path
) -> None:
    (manifest,) = (tmp_path / "run").glob("tokenizer/checkpoints/step-00000002/*/manifest.json")
    manifest.write_bytes(b"{}")
    first, second = run_checkpoint_action("list", config, "tokenizer").report["checkpoints"]
    assert "damaged" in first["problem"]
    assert second["problem"] is None
