"""A run that is killed in the middle of every stage ends with the results of one that never was.

The unbroken run is the command as users give it. The other gives the same command again and again;
each session is killed (SIGKILL, no clean-up) after the stage in question has committed something
and before it has committed all. Everything that stages hand on is compared byte by byte; of what
holds times (records, metrics), all but the times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.records import is_time, read_records

from fqgan_dist.config import load_config
from fqgan_dist.stages.catalog import stage_names
from fqgan_dist.stages.checkpoints import run_checkpoint_action
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore, LoadedCheckpoint
from fqgan_dist.training.commit_log import CommitLog, CommitRecord, StartRecord
from fqgan_dist.training.config import CheckpointTarget

TESTS_DIR = Path(__file__).parents[1]
CONFIG = TESTS_DIR / "support" / "tiny.yaml"
TIMEOUT_S = 500
TRAINED = ("tokenizer", "autoregressive")
KILL_POINTS = {
    "shards": ("/train/shard-000001.tar", 1),  # the second of three
    "teachers": ("/features/", 2),
    # Of a session's own log: 1 its start, 2 the commit of step 2, 3 that of step 4.
    "tokenizer": ("/tokenizer/checkpoints/commits/", 3),
    "codes": ("/codes/", 2),
    "autoregressive": ("/autoregressive/checkpoints/commits/", 3),
    "samples": ("/samples/", 3),  # its record, a chunk, and the second of three
    "exports": ("/samples/exports/", 7),  # in the second chunk of four images and their labels
    "evaluation": ("/evaluation/reference/", 2),
    "report": ("/figures/", 2),
}


@dataclass(frozen=True)
class Runs:
    """Root folders of both runs, and of the killed one after each kill."""

    unbroken: Path
    killed: Path


def command(root: Path) -> list[str]:
    return ["run", str(CONFIG), f"storage.root={root}", "samples.export=png"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("kill")
    pair = Runs(folder / "unbroken", folder / "killed")
    # Side by side: one core each.
    unbroken = start("-m", "fqgan_dist.cli", *command(pair.unbroken))
    script = str(TESTS_DIR / "support" / "killed_runs.py")
    points = list(KILL_POINTS.values())
    killed = start(script, json.dumps(points), *command(pair.killed))
    outputs: list[tuple[int, str]] = []
    for process in (unbroken, killed):
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        outputs.append((process.returncode, output))
    assert [code for code, _ in outputs] == [0, 0], "\n".join(text for _, text in outputs)
    last = start("-m", "fqgan_dist.cli", *command(pair.killed))
    output, _ = last.communicate(timeout=TIMEOUT_S)
    assert last.returncode == 0, output
    return pair


def summary(root: Path) -> dict[str, Any]:
    stages = json.loads((root / "summary.json").read_text())
    for stage in stages.values():
        assert stage.pop("seconds") > 0
    return stages


def files(root: Path, *folders: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def newest(root: Path, stage: str) -> LoadedCheckpoint:
    loaded = CheckpointStore(Storage(root), f"{stage}/checkpoints").load_latest()
    assert loaded is not None
    return loaded


def test_the_command_that_was_killed_in_every_stage_is_done_with_all_of_them(runs: Runs) -> None:
    assert tuple(KILL_POINTS) == stage_names()
    states = {name: stage["state"] for name, stage in summary(runs.killed).items()}
    assert states == dict.fromkeys(stage_names(), "done")


@pytest.mark.parametrize("stage", TRAINED)
def test_training_was_killed_between_checkpoints(runs: Runs, stage: str) -> None:
    checkpoints = Storage(runs.killed).child(f"{stage}/checkpoints")
    log = [record for _, record in CommitLog(checkpoints).newest_first()]
    first, second = [record for record in reversed(log) if isinstance(record, StartRecord)]
    committed = [
        (record.attempt, record.step)
        for record in reversed(log)
        if isinstance(record, CommitRecord)
    ]
    assert committed == [(first.attempt, 2), (second.attempt, 4), (second.attempt, 6)]


def test_the_summary_is_equal_to_the_bit(runs: Runs) -> None:
    assert summary(runs.killed) == summary(runs.unbroken)
    assert summary(runs.killed)["tokenizer"]["metrics"]["rfid"] > 0
    assert summary(runs.killed)["samples"]["metrics"]["gfid"] > 0


@pytest.mark.parametrize("folder", ["data", "features", "codes", "samples", "evaluation"])
def test_every_file_is_equal_to_the_bit(runs: Runs, folder: str) -> None:
    expected, actual = files(runs.unbroken, folder), files(runs.killed, folder)
    assert expected.keys() == actual.keys()
    assert len(expected) >= 3
    assert [name for name, data in expected.items() if actual[name] != data] == []


@pytest.mark.parametrize("stage", TRAINED)
def test_the_last_checkpoints_are_equal_to_the_bit(runs: Runs, stage: str) -> None:
    expected, actual = newest(runs.unbroken, stage), newest(runs.killed, stage)
    assert expected.step == actual.step == 6
    assert expected.manifest.parts == actual.manifest.parts
    assert (expected.manifest.state, expected.manifest.metrics) == (
        actual.manifest.state,
        actual.manifest.metrics,
    )
    for part in expected.manifest.parts:
        ours, theirs = actual.read(part), expected.read(part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("stage", TRAINED)
def test_the_metrics_file_is_that_of_an_unbroken_run(runs: Runs, stage: str) -> None:
    records = [
        [
            {name: value for name, value in record.items() if not is_time(name)}
            for record in read_records(root / stage / "metrics.jsonl")
        ]
        for root in (runs.unbroken, runs.killed)
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 9  # six steps, three evaluations


def read_record(root: Path, stage: str) -> dict[str, Any]:
    folder = root / "manifests"
    (path,) = [*folder.glob(f"{stage}.json"), *folder.glob(f"{stage}/*.json")]
    return json.loads(path.read_text()) | {"name": path.name}


@pytest.mark.parametrize("stage", stage_names())
def test_the_records_of_the_stages_are_equal(runs: Runs, stage: str) -> None:
    first, second = (read_record(root, stage) for root in (runs.unbroken, runs.killed))
    assert first.pop("seconds") > 0
    assert second.pop("seconds") > 0
    assert first == second


def test_the_report_is_there(runs: Runs) -> None:
    names = set(files(runs.unbroken, "figures"))
    assert names == set(files(runs.killed, "figures"))
    assert (runs.killed / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("stage", TRAINED)
def test_the_ledger_proves_that_every_image_was_trained_on_once(runs: Runs, stage: str) -> None:
    reports = []
    for root in (runs.unbroken, runs.killed):
        config = load_config(CONFIG, [f"storage.root={root}"], RunConfig)
        target = CheckpointTarget(ledger=True)
        result = run_checkpoint_action("verify", config, stage, target)  # pyright: ignore[reportArgumentType]
        assert not result.is_damaged, result.text
        reports.append(result.report)
    assert reports[0] == reports[1]
    assert reports[0]["num_rehashed"] == reports[0]["num_commits"] == 3
    assert reports[0]["positions"] == sum(epoch["images"] for epoch in reports[0]["epochs"]) > 0
