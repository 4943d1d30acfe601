from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest
from support.dead_owners import name_dead_owner
from support.tiny_tasks import load_tiny

from fqgan_dist.stages.run import open_run
from fqgan_dist.world import World


def test_a_new_root_is_closed_to_other_users(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "mine"
    open_run(load_tiny(f"storage.root={root}"), World())
    assert stat.S_IMODE(root.stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("process", "rank", "local_rank", "is_swept"),
    [
        ("run", 0, 0, ["tokenizer", "other", "scratch"]),
        ("tokenizer", 0, 0, ["tokenizer", "scratch"]),
        ("tokenizer", 2, 0, ["tokenizer", "scratch"]),
        ("tokenizer", 3, 1, []),
    ],
)
def test_the_first_process_of_each_node_removes_what_killed_ones_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    process: str,
    rank: int,
    local_rank: int,
    is_swept: list[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root, dead = tmp_path / "run", name_dead_owner()
    left = {
        "tokenizer": root / "tokenizer" / "checkpoints" / f".x.writing-{dead}-00000000",
        "other": root / f".y.writing-{dead}-00000000",
        "scratch": tmp_path / f"fqgan-log-{dead}-abcdefgh" / "process.log",
    }
    for path in left.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))
    world = World(rank=rank, world_size=4, local_rank=local_rank)
    with caplog.at_level("INFO"):
        open_run(load_tiny(f"storage.root={root}"), world, process=process)
    assert [name for name, path in left.items() if not path.exists()] == is_swept
    lines = [line for line in caplog.messages if "killed processes" in line]
    assert lines == (
        [f"removed what killed processes had left: {len(is_swept)} files, 0.0 MB"]
        if is_swept
        else []
    )
