"""`fqgan-data shard` killed at any point, or twice at the same time."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from support import shard_jobs
from support.radosgw import S3_BUCKET

from data_tools.cli import main
from fqgan_dist.storage.storage import Storage

KILLED = -signal.SIGKILL
NUM_SHARDS = 10
NUM_KILLS = 20
SETTINGS = ["name=x", "split=train", "samples_per_shard=6", "workers=1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 small images of four classes, and one that is none."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(60):
        path = root / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (root / "class0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a job that nobody interrupts."""
    destination = tmp_path_factory.mktemp("whole") / "dataset"
    assert main(["shard", str(images), str(destination), *SETTINGS]) == 0
    return read_files(Storage(destination))


def read_files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read_bytes(name) for name in storage.list()}


def session(*arguments: str, die: tuple[str, int, bool] | None = None) -> dict[str, Any]:
    return {"arguments": list(arguments), "die": die}


def run(steps: list[list[dict[str, Any]]]) -> list[list[tuple[int, str]]]:
    result = subprocess.run(
        [sys.executable, shard_jobs.__file__, json.dumps(steps)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [[(code, errors) for code, errors in step] for step in json.loads(result.stdout)]


def draw_kills() -> list[tuple[str, int, bool]]:
    """Draw points from everything that a whole job does: about two syncs and one link per file."""
    num_files = 2 * NUM_SHARDS + 5
    generator = random.Random(4)
    places = [("fsync", number) for number in range(1, 2 * num_files - 5)]
    places += [(call, number) for call in ("link", "unlink") for number in range(1, num_files - 1)]
    return [(*place, generator.random() < 0.5) for place in generator.sample(places, NUM_KILLS)]


def test_a_job_that_is_killed_anywhere_and_resumed_is_the_unbroken_one(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    kills = draw_kills()
    steps = []
    for number, kill in enumerate(kills):
        out, left = str(tmp_path / f"{number}"), str(tmp_path / f"left-{number}")
        job = ["shard", str(images), out, *SETTINGS]
        steps += [[session(*job, die=kill)], [session("copy", out, left)], [session(*job)]]
    codes = [code for ((code, _),) in run(steps)]
    assert codes == [KILLED, 0, 0] * NUM_KILLS
    for number, kill in enumerate(kills):
        # Only whole files are left; the index too, if the point was after its link.
        left = read_files(Storage(tmp_path / f"left-{number}"))
        assert left.items() <= whole.items(), kill
        assert read_files(Storage(tmp_path / f"{number}")) == whole, kill
    assert main(["verify", str(tmp_path / "0"), "deep=true", "workers=1"]) == 0


@pytest.mark.full("the same kills as on a local disk")
@pytest.mark.usefixtures("s3_credentials")
def test_a_job_on_s3_that_is_killed_and_resumed_is_the_unbroken_one(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    kills = [("create_bytes", 1, True), ("create_bytes", 7, False), ("create_bytes", 12, True)]
    steps = []
    for number, kill in enumerate(kills):
        arguments = ["shard", str(images), f"s3://{S3_BUCKET}/{tmp_path.name}/{number}", *SETTINGS]
        steps += [[session(*arguments, die=kill)], [session(*arguments)]]
    results = run(steps)
    assert [step[0][0] for step in results] == [KILLED, 0] * len(kills)
    for number in range(len(kills)):
        assert read_files(Storage(f"s3://{S3_BUCKET}/{tmp_path.name}/{number}")) == whole


@pytest.mark.full("jobs at once; that one writer wins is proven in unit/sharding")
def test_of_two_jobs_at_once_the_same_ones_agree_and_another_is_refused(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    same = ["shard", str(images), str(tmp_path / "same"), *SETTINGS]
    rival = ["shard", str(images), str(tmp_path / "rival"), *SETTINGS]
    agreed, contested = run(
        [
            [session(*same), session(*same)],
            [session(*rival), session(*rival, "seed=1")],
        ]
    )
    assert [code for code, _ in agreed] == [0, 0], agreed
    assert read_files(Storage(tmp_path / "same")) == whole
    assert sorted(code for code, _ in contested) == [0, 1], contested
    assert any("choose another destination" in errors for _, errors in contested)
    assert main(["verify", str(tmp_path / "rival"), "deep=true", "workers=1"]) == 0


def test_workers_die_with_a_job_that_is_killed(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = ["shard", str(images), str(tmp_path / "out"), *SETTINGS[:-1], "workers=2"]
    job = psutil.Popen([sys.executable, "-m", "data_tools.cli", *arguments])
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.samples.parquet")):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.02)
    workers = job.children()
    job.kill()
    job.wait()
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert main(["shard", str(images), str(tmp_path / "out"), *SETTINGS]) == 0
    assert read_files(Storage(tmp_path / "out")) == whole
