"""A stage that is added in three places (support/toy_stage.py) runs everywhere like the others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support import toy_stage

from fqgan_dist.config import load_config
from fqgan_dist.errors import ConfigError
from fqgan_dist.orchestration.driver import run_pipeline
from fqgan_dist.stages import catalog
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.plan import plan_run
from fqgan_dist.stages.plan_rendering import render_plan

TINY = Path(__file__).parents[1] / "support" / "tiny.yaml"
IMAGES = 48
"""Training crops of tiny.yaml."""


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = catalog.STAGES
    monkeypatch.setattr(catalog, "STAGES", (first, toy_stage.ENTRY, *others))


def load(root: Path, *overrides: str) -> toy_stage.ToyRunConfig:
    settings = [f"storage.root={root}", "stages=[toy, shards]", *overrides]
    return load_config(TINY, settings, toy_stage.ToyRunConfig)


def counted(root: Path) -> dict[str, int]:
    return {path.name: int(path.read_text()) for path in sorted((root / "toy" / "1").iterdir())}


def test_it_runs_in_its_place_once_and_again_for_other_settings(tmp_path: Path) -> None:
    summary = run_pipeline(load(tmp_path))
    assert list(summary) == ["shards", "toy"]
    assert summary["toy"]["metrics"] == {"total": IMAGES}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")}
    assert run_pipeline(load(tmp_path)) == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")} == files
    heavier = run_pipeline(load(tmp_path, "toy.weight=3"))["toy"]
    assert heavier["metrics"] == {"total": 3 * IMAGES}
    (other,) = heavier["others"]
    assert (other["inputs"], other["metrics"]) == (
        {"settings.weight": 1},
        {"toy/total": IMAGES},
    )
    assert json.loads((tmp_path / "summary.json").read_text())["toy"] == heavier


def test_a_lost_chunk_alone_is_made_again(tmp_path: Path) -> None:
    run_pipeline(load(tmp_path))
    before = counted(tmp_path)
    (record,) = (tmp_path / "manifests" / "toy").iterdir()
    record.unlink()
    lost, *kept = sorted((tmp_path / "toy" / "1").iterdir())
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in kept}
    run_pipeline(load(tmp_path))
    assert counted(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == times


def test_a_damaged_record_stops_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary = run_pipeline(load(tmp_path))
    records = [tmp_path / "manifests" / "shards.json", *(tmp_path / "manifests" / "toy").iterdir()]
    for record in records:
        record.write_bytes(record.read_bytes()[:-20])
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")}
    again = run_pipeline(load(tmp_path))
    assert {name: each["metrics"] for name, each in again.items()} == {
        name: each["metrics"] for name, each in summary.items()
    }
    assert caplog.text.count("it is set aside as") == len(records)
    for record in records:
        assert json.loads(record.read_text())
        assert list(record.parent.glob(f"{record.name}.damaged-*"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").rglob("*")} == made


def test_it_is_taken_from_another_run(tmp_path: Path) -> None:
    run_pipeline(load(tmp_path / "first"))
    upstream = f"upstream={{shards: {tmp_path / 'first'}}}"
    summary = run_pipeline(load(tmp_path / "second", upstream))
    assert summary["toy"]["metrics"] == {"total": IMAGES}
    assert summary["shards"]["taken_from"] == str(tmp_path / "first")
    assert not (tmp_path / "second" / "data").exists()
    assert counted(tmp_path / "second") == counted(tmp_path / "first")


def test_its_pool_and_its_settings_are_checked_like_all(tmp_path: Path) -> None:
    pool = "ray.pools.toy={max_actors: 2}"
    plan = plan_run(load(tmp_path, "execution=ray", pool))
    assert plan["placement"]["pools"]["toy"]["max_actors"] == 2
    assert "pool of toy" in render_plan(plan)
    with pytest.raises(ConfigError, match=r"toy\.weihgt: unknown setting; did you mean 'weight'\?"):
        load(tmp_path, "toy.weihgt=1")
    with pytest.raises(ConfigError, match=r"stages: 'tooy' is no stage; did you mean 'toy'\?"):
        load(tmp_path, "stages=[tooy]")


def test_without_its_line_nobody_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = tuple(entry for entry in catalog.STAGES if entry != toy_stage.ENTRY)
    monkeypatch.setattr(catalog, "STAGES", stages)
    with pytest.raises(ConfigError, match="'toy' is no stage"):
        load_config(TINY, [f"storage.root={tmp_path}", "stages=[toy]"], RunConfig)


@pytest.mark.ray
def test_its_chunks_run_on_actors_of_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its module must be importable where it works, as any stage's.
    monkeypatch.setenv("PYTHONPATH", str(TINY.parents[1]), prepend=os.pathsep)
    run_pipeline(load(tmp_path / "here"))
    config = load(tmp_path / "ray", "execution=ray", "ray.local_cpus=2")
    assert run_pipeline(config)["toy"]["metrics"] == {"total": IMAGES}
    assert counted(tmp_path / "ray") == counted(tmp_path / "here")
    assert list((tmp_path / "ray" / "logs").glob("toy-actor-*.log"))
