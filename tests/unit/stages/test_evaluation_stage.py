"""Inputs of the `evaluation` stage, and the files that are looked for before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.stage_records import DATASETS, WEIGHTS, save_stage

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.evaluation import Evaluated, EvaluationStage
from fqgan_dist.stages.preflight import check_run
from fqgan_dist.stages.run import is_stage_done
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.stage_record import StageRecord, record_path, save_record
from fqgan_dist.stages.summary import load_summary
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"
PUBLISHED = "evaluation.inception={resolution: 299, weights: {source: hub}}"


def open_context(root: Path, *overrides: str) -> RunContext:
    config = load_config(TINY, [f"storage.root={root}", *overrides], RunConfig)
    return RunContext(
        config=config, storage=Storage(root), world=World(), device=torch.device("cpu")
    )


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A run whose tokenizer has finished."""
    return finish_tokenizer(open_context(tmp_path))


def finish_tokenizer(context: RunContext) -> RunContext:
    save_stage(context, "shards", DATASETS)
    save_stage(context, "tokenizer", WEIGHTS)
    return context


def test_a_tokenizer_is_judged_before_there_are_samples_and_again_with_them(
    context: RunContext,
) -> None:
    stage = EvaluationStage(context)
    assert stage.upstream()["samples"] is None
    save_stage(context, "evaluation", {})
    assert is_stage_done(stage)
    save_stage(context, "autoregressive", WEIGHTS)
    assert is_stage_done(stage)
    save_stage(context, "samples", {"fingerprint": "s"}, state="started")
    assert is_stage_done(stage)  # samples that are being drawn are none yet
    save_stage(context, "samples", {"fingerprint": "s"})
    assert stage.upstream()["samples"] == "s"
    assert not is_stage_done(stage)


def test_a_record_of_a_run_that_had_but_one_is_found(context: RunContext) -> None:
    stage = EvaluationStage(context)
    record = StageRecord(stage="evaluation", state="done", inputs=stage.collect_inputs())
    save_record(context.storage, record_path("evaluation"), record)
    assert is_stage_done(stage)
    assert context.read(Evaluated).figures == "evaluation/figures"
    other = open_context(Path(context.storage.root), "evaluation.reference_samples=3")
    assert not is_stage_done(EvaluationStage(other))


def test_adm_reference_counts_by_its_content(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("first.npz", "moved.npz", "other.npz")]
    for path, scale in zip(paths, (1, 1, 2), strict=True):
        np.savez(path, mu=np.zeros(2), sigma=scale * np.eye(2))
    finish_tokenizer(open_context(tmp_path))
    without = EvaluationStage(open_context(tmp_path, PUBLISHED))
    first, moved, other = (
        EvaluationStage(open_context(tmp_path, PUBLISHED, f"evaluation.adm_reference={path}"))
        for path in paths
    )
    save_stage(first.context, "evaluation", {})
    assert is_stage_done(first)
    assert is_stage_done(moved)
    assert not is_stage_done(other)
    assert not is_stage_done(without)


def test_pending_evaluation_needs_teachers_inception_and_reference(tmp_path: Path) -> None:
    files = [f"{tmp_path}/{name}" for name in ("clip.safetensors", "fid.safetensors", "adm.npz")]
    overrides = [
        f"teachers.networks.1.weights.source={files[0]}",
        f"evaluation.inception={{resolution: 299, weights: {{source: {files[1]}}}}}",
        f"evaluation.adm_reference={files[2]}",
    ]
    context = open_context(tmp_path, *overrides)
    # The features are stored, so that only the evaluation still runs the teachers.
    finish_tokenizer(context)
    save_stage(context, "teachers", {"fingerprint": "f"})
    with pytest.raises(ConfigError) as caught:
        check_run(context)
    for file in files:
        assert str(caught.value).count(file) == 1
    np.savez(files[2], mu=np.zeros(2), sigma=np.eye(2))  # its content is an input
    save_stage(context, "evaluation", {})
    check_run(context)


def test_a_reference_that_is_not_there_keeps_no_summary_from_being_written(
    tmp_path: Path,
) -> None:
    """A training whose evaluation comes later, for example."""
    missing = f"evaluation.adm_reference={tmp_path}/none.npz"
    context = finish_tokenizer(open_context(tmp_path, PUBLISHED, missing))
    with pytest.raises(ConfigError, match=r"none\.npz"):
        EvaluationStage(context).load_record()
    assert list(load_summary(context)) == ["shards", "tokenizer"]
