"""What stages say of what they read: it is made before, and it is all that they read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.stage_records import DATASETS, WEIGHTS, save_stage

from fqgan_dist.config import load_config
from fqgan_dist.orchestration.pipeline import open_checked_run
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import (
    RunContext,
    Stage,
    StageNotFinishedError,
    StageOutput,
    all_stages,
    build_stages,
)
from fqgan_dist.storage.storage import Storage
from fqgan_dist.world import World

TINY = Path(__file__).parents[2] / "support" / "tiny.yaml"


def load(root: Path, *overrides: str) -> RunConfig:
    return load_config(TINY, [f"storage.root={root}", *overrides], RunConfig)


@pytest.fixture
def finished(tmp_path: Path) -> RunContext:
    """A run whose stages have all finished, as their records say."""
    context = RunContext(
        config=load(tmp_path, "samples.export=png"),
        storage=Storage(tmp_path),
        world=World(),
        device=torch.device("cpu"),
    )
    outputs = {
        "shards": DATASETS,
        "teachers": {"fingerprint": "f"},
        "codes": DATASETS,
        "samples": {"fingerprint": "s"},
        "exports": {"path": "p"},
        "report": {"report": "r"},
    }
    for stage in all_stages():
        save_stage(context, stage.name, outputs.get(stage.name, WEIGHTS))
    return context


def test_what_a_stage_reads_is_made_before_it() -> None:
    made: set[type[StageOutput]] = set()
    for stage in all_stages():
        assert made >= {*stage.inputs, *stage.optional_inputs}, stage.name
        made.add(stage.output)


def test_a_stage_reads_what_it_says(finished: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    find, read = RunContext.find, set[type[StageOutput]]()

    def note(context: RunContext, kind: type[StageOutput]) -> StageOutput | None:
        read.add(kind)
        return find(context, kind)

    for stage in build_stages(finished):
        read.clear()
        with monkeypatch.context() as patched:
            patched.setattr(RunContext, "find", note)
            stage.upstream()
        # What a stage reads may have a record for each set of inputs, which reads in its turn.
        assert read <= _closure(type(stage)), stage.name
        assert {kind for kind in stage.inputs if kind.stage != "shards"} <= read, stage.name


def _closure(stage: type[Stage]) -> set[type[StageOutput]]:
    makers = {each.output: each for each in all_stages()}
    kinds = {*stage.inputs, *stage.optional_inputs}
    return kinds.union(*(_closure(makers[kind]) for kind in kinds))


def test_what_nobody_would_make_is_missed_before_anything_runs(tmp_path: Path) -> None:
    config = load(tmp_path, "stages=[shards, teachers, codes]")
    with pytest.raises(StageNotFinishedError, match="stage 'tokenizer' has not finished"):
        open_checked_run(config)
    assert not (tmp_path / "data").exists()
    open_checked_run(load(tmp_path, "stages=[shards, teachers, tokenizer, codes]"))
