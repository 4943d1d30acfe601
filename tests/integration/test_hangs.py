"""A rank that is stopped, one whose loader stands still, one that never enters a collective: each
is found within the bound and named, and the run ends as one that never hung.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.records import is_time, read_records

TESTS = Path(__file__).parents[1]
TINY = TESTS / "support" / "tiny.yaml"
TIMEOUT_S = 500
ON_RAY = (
    "execution=ray",
    "ray.train.num_workers=2",
    "ray.local_cpus=2",
    "data.loader_workers=1",
    "stages=[shards, teachers, tokenizer]",
    "tokenizer.training.steps=12",
    # Of a busy machine's steps none is as long.
    "watchdog={after_s: 10, warn_after_s: 4, slow_after_s: 200}",
)
CULPRITS = {
    ("stop", 1): "rank 1/2 node0 gives no sign of life",
    ("stop", 0): "rank 0/2 node0 gives no sign of life",
    ("loader", 1): "the loader of rank 1/2 node0 gives no batch",
    ("collective", 1): "rank 1/2 node0 has not entered the collective",
}

pytestmark = [
    pytest.mark.ray,
    pytest.mark.full("trains on Ray; the rules are proven in unit/telemetry, ranks by torchrun"),
    pytest.mark.timeout(2 * TIMEOUT_S),
]


def run(root: Path, *options: str, hang: str = "") -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if hang:
        paths = [str(TESTS / "support" / "hanging"), environment.get("PYTHONPATH", "")]
        environment |= {"FQGAN_TEST_HANG": hang, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "fqgan_dist.cli", "run", str(TINY), f"storage.root={root}"]
    done = subprocess.run(
        [*command, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def metrics(root: Path) -> list[dict[str, Any]]:
    records = read_records(root / "tokenizer" / "metrics.jsonl")
    return [{k: v for k, v in each.items() if not is_time(k)} for each in records]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hangs") / "unbroken"
    log = run(root, *ON_RAY)
    assert "HangError" not in log
    return root


@pytest.mark.parametrize(("how", "culprit"), CULPRITS)
def test_a_hang_is_named_and_the_run_ends_as_one_without(
    how: str, culprit: int, unbroken: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(unbroken, root, ignore=shutil.ignore_patterns("tokenizer*", "logs"))
    log = run(root, *ON_RAY, hang=f"{how}:{culprit}:{tmp_path / 'hung'}")
    assert (tmp_path / "hung").exists()
    lines = log.splitlines()
    (warning,) = [line for line in lines if "starting again from the newest checkpoint" in line]
    assert CULPRITS[how, culprit] in warning
    assert "HangError: nothing moves since" in warning
    # Long before: the first line is said at a fraction of the bound.
    assert re.search(r"tokenizer: nothing moves since [4-9]\.\d s: .*step [5-9]", log)
    logs = {path.name: path.read_text() for path in (root / "logs").iterdir()}
    for rank in (0, 1):
        stacks = [
            text
            for name, text in logs.items()
            if name.startswith(f"tokenizer-rank-{rank:05d}") and "HANGS" in text
        ]
        if how == "stop" and rank == culprit:
            stacks = [text for text in logs.values() if f"stacks of rank {rank}/2 node0" in text]
        assert len(stacks) == 1
        assert "training/trainer.py" in stacks[0]
        if how == "loader" and rank == culprit:
            assert "stopped: its child process" in stacks[0]
            assert "stacks of its process" in stacks[0]
    assert metrics(root) == metrics(unbroken)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (root, unbroken)]
    assert summaries[0]["tokenizer"]["metrics"] == summaries[1]["tokenizer"]["metrics"]
