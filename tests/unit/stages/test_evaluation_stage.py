"""Inputs of the `evaluation` stage, and the files that are looked for before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.evaluation import EvaluationStage
from fqgan_dist.stages.manifest import StageRecord, check_inputs, flatten, save_record
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
PUBLISHED = "evaluation.inception={resolution: 299, weights: {source: hub}}"


def open_context(root: Path, *overrides: str) -> RunContext:
    config = load_config(TINY, [f"storage.root={root}", *overrides], RunConfig)
    return RunContext(
        config=config, storage=Storage(root), world=World(), device=torch.device("cpu")
    )


def finish(context: RunContext, stage: str, outputs: dict[str, Any], state: str = "done") -> None:
    values = {"stage": stage, "state": state, "inputs": {}, "outputs": outputs}
    save_record(context.storage, StageRecord.model_validate(values))


def collect_inputs(context: RunContext) -> dict[str, Any]:
    stage = EvaluationStage(context)
    return flatten({"settings": stage.settings(), "upstream": stage.upstream()})


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A run whose tokenizer has finished."""
    context = open_context(tmp_path)
    finish(context, "shards", {"train": "d", "val": "v"})
    finish(context, "tokenizer", {"weights": "t"})
    return context


def save_inputs(context: RunContext) -> None:
    inputs = collect_inputs(context)
    save_record(context.storage, StageRecord(stage="evaluation", state="done", inputs=inputs))


def test_samples_that_come_later_extend_the_evaluation(context: RunContext) -> None:
    save_inputs(context)
    finish(context, "samples", {"fingerprint": "s"})
    record = check_inputs(context.storage, "evaluation", collect_inputs(context))
    assert record is not None
    assert record.state == "started"


def test_samples_that_are_being_extended_are_to_be_finished_first(context: RunContext) -> None:
    finish(context, "samples", {"fingerprint": "s"})
    save_inputs(context)
    finish(context, "samples", {}, state="started")
    with pytest.raises(DataError, match="run `fqgan sample` with this config first"):
        EvaluationStage(context).upstream()


def test_samples_that_were_never_judged_may_be_unfinished(context: RunContext) -> None:
    save_inputs(context)
    finish(context, "samples", {}, state="started")
    assert EvaluationStage(context).upstream()["samples"] is None


def test_adm_reference_counts_by_its_content(context: RunContext, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first.npz", "moved.npz", "other.npz")]
    for path, scale in zip(paths, (1, 1, 2), strict=True):
        np.savez(path, mu=np.zeros(2), sigma=scale * np.eye(2))
    save_inputs(context)
    with_reference = [
        open_context(tmp_path, PUBLISHED, f"evaluation.adm_reference={path}") for path in paths
    ]
    with pytest.raises(DataError, match="has_adm_reference: was False, now True"):
        check_inputs(context.storage, "evaluation", collect_inputs(with_reference[0]))
    save_inputs(with_reference[0])
    assert check_inputs(context.storage, "evaluation", collect_inputs(with_reference[1]))
    with pytest.raises(DataError, match=r"upstream\.adm_reference: was"):
        check_inputs(context.storage, "evaluation", collect_inputs(with_reference[2]))


def test_pending_evaluation_needs_teachers_inception_and_reference(tmp_path: Path) -> None:
    files = [f"{tmp_path}/{name}" for name in ("clip.safetensors", "fid.safetensors", "adm.npz")]
    overrides = [
        f"teachers.networks.1.weights.source={files[0]}",
        f"evaluation.inception={{resolution: 299, weights: {{source: {files[1]}}}}}",
        f"evaluation.adm_reference={files[2]}",
    ]
    context = open_context(tmp_path, *overrides)
    # The features are stored, so that only the evaluation still runs the teachers.
    finish(context, "teachers", {"fingerprint": "f"})
    with pytest.raises(ConfigError) as caught:
        check_run(context)
    for file in files:
        assert str(caught.value).count(file) == 1
    finish(context, "evaluation", {})
    check_run(context)
