"""A finished run that is asked for more, for something else, or for what another run has made."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.records import read_records

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.orchestration.driver import run_pipeline
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.summary import Summary
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
CONSTANT = "autoregressive.training.schedule.kind=constant"

pytestmark = pytest.mark.filterwarnings(
    # torch's event files are left to the garbage collector by tensorboard's own queue thread.
    "ignore:unclosed file:ResourceWarning"
)


def run(root: Path, *overrides: str) -> Summary:
    return run_pipeline(load_config(TINY, [f"storage.root={root}", *overrides], RunConfig))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    run(root, CONSTANT)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def weights(root: Path, stage: str, step: int) -> dict[str, torch.Tensor]:
    loaded = CheckpointStore(Storage(root), f"{stage}/checkpoints").load_latest(step=step)
    assert loaded is not None
    return loaded.read(stage)


def read_record(root: Path, stage: str) -> dict[str, Any]:
    return json.loads((root / "manifests" / f"{stage}.json").read_text())


def test_more_steps_continue_and_end_where_one_long_training_ends(
    root: Path, tmp_path: Path
) -> None:
    longer = "autoregressive.training.steps=10"
    summary = run(root, CONSTANT, longer)
    at_once = run(tmp_path / "at_once", CONSTANT, longer)
    steps = [record["step"] for record in read_records(root / "autoregressive" / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(1, 11))
    ours, theirs = (weights(each, "autoregressive", 10) for each in (root, tmp_path / "at_once"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    record = read_record(root, "autoregressive")
    assert record["history"] == {"settings.training.steps": [6]}
    assert record["outputs"] == read_record(tmp_path / "at_once", "autoregressive")["outputs"]
    # What hangs on the generator is made for the new one, beside what there was.
    assert summary["samples"]["metrics"] == at_once["samples"]["metrics"]
    (former,) = summary["samples"]["others"]
    assert "upstream.autoregressive" in former["inputs"]


def test_a_decaying_rate_is_said_to_have_been_another_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages = "stages=[shards, teachers, tokenizer]"
    cosine = "tokenizer.training.schedule.kind=cosine"
    run(tmp_path, stages, cosine)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, stages, cosine, "tokenizer.training.steps=8")
    assert "trained over 6, then 8 steps in turn with a cosine schedule" in caplog.text
    assert read_record(tmp_path, "tokenizer")["history"] == {"settings.training.steps": [6]}


def test_fewer_steps_are_refused_and_so_is_what_would_mix_with_the_former_codes(
    root: Path,
) -> None:
    with pytest.raises(DataError, match=r"settings\.training\.steps: was 6, now 4"):
        run(root, CONSTANT, "autoregressive.training.steps=4")
    with pytest.raises(DataError, match=r"stage 'codes' was made from other inputs:\s+upstream"):
        run(root, CONSTANT, "tokenizer.training.steps=8")


@pytest.mark.full("a whole run; test_added_stage does so with a small stage")
def test_another_guidance_is_another_record_and_the_first_is_found_again(root: Path) -> None:
    first = json.loads((root / "summary.json").read_text())
    other = run(root, CONSTANT, "samples.sampling.guidance_scale=3.0")
    assert other["samples"]["metrics"]["gfid"] != first["samples"]["metrics"]["gfid"]
    (listed,) = other["samples"]["others"]
    assert listed["inputs"] == {"settings.sampling.guidance_scale": 1.5}
    (judged,) = other["evaluation"]["others"]
    assert judged["metrics"]["samples/gfid"] == first["samples"]["metrics"]["gfid"]
    assert "Other records" in (root / "report.html").read_text()
    again = run(root, CONSTANT)
    assert again["samples"]["metrics"] == first["samples"]["metrics"]
    assert len(again["samples"]["others"]) == 1
    files = root.glob("evaluation/results/*/samples.json")
    assert {json.loads(path.read_text())["results"]["gfid"] for path in files} == {
        first["samples"]["metrics"]["gfid"],
        other["samples"]["metrics"]["gfid"],
    }


@pytest.mark.full("a whole run; the record of the report is a unit test")
def test_another_title_makes_the_report_anew_and_nothing_else(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    run(root, CONSTANT, "name=Another title")
    assert "Another title" in (root / "report.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_a_run_takes_what_another_has_made_and_ends_with_its_numbers(
    finished: Path, tmp_path: Path
) -> None:
    upstream = ", ".join(f"{stage}: {finished}" for stage in ("shards", "teachers", "tokenizer"))
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    summary = run(tmp_path, CONSTANT, f"upstream={{{upstream}}}")
    expected = json.loads((finished / "summary.json").read_text())
    for stage, found in summary.items():
        assert found["metrics"] == expected[stage]["metrics"], stage
    assert summary["tokenizer"]["taken_from"] == str(finished)
    assert not any((tmp_path / name).exists() for name in ("data", "features", "tokenizer"))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ("tokenizer.losses.entropy_weight=0.5",),
            DataError,
            r"upstream\.tokenizer: .*settings\.losses\.entropy_weight: was 0\.03, now 0\.5",
        ),
        (("upstream.tokenizer=/nowhere",), DataError, "has not finished there"),
        (("upstream.samples=/nowhere",), ConfigError, r"upstream\.samples: cannot be taken"),
        (("upstream.tokeniser=/nowhere",), ConfigError, "did you mean 'tokenizer'"),
    ],
)
def test_what_cannot_be_taken_is_refused_before_anything_runs(
    finished: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    taken = f"upstream={{shards: {finished}, tokenizer: {finished}}}"
    with pytest.raises(error, match=f"(?s){message}"):
        run(tmp_path / "run", CONSTANT, taken, *overrides)
    assert not (tmp_path / "run" / "manifests").exists()
