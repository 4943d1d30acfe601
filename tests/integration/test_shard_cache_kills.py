from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from support import cache_processes
from support.synthetic_shards import publish_dataset

from fqgan_dist.data.cache_folder import CacheFolder, Claim
from fqgan_dist.storage.storage import Storage

SHARDS = 4
KILLS = 40


def test_killed_jobs_leave_a_cache_that_is_right_and_within_its_bounds(tmp_path: Path) -> None:
    # Two datasets of 4 shards share a cache with room for 5: jobs evict each other's shards
    # whenever nobody reads a dataset for a moment.
    store, path = tmp_path / "store", tmp_path / "cache"
    for seed in (1, 2):
        folder = Storage(store / str(seed))
        index = publish_dataset(folder, [5] * SHARDS, image_bytes=50_000, seed=seed)
    shard_bytes = index.shards[0].bytes
    max_bytes = 5 * shard_bytes + shard_bytes // 2
    result = subprocess.run(
        [sys.executable, cache_processes.__file__, store, path, str(max_bytes), str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    check_shards(path, max_bytes)
    # One claim tidies up: of the killed jobs nothing is left, and all room is there again.
    roomy = CacheFolder(path, max_bytes=max_bytes, min_free_bytes=0)
    claim, evicted = roomy.claim("f" * 64, max_bytes)
    assert isinstance(claim, Claim)
    assert evicted <= 5
    with claim:
        assert not list(path.glob("*.tar"))
        assert not list(path.glob("*.part"))
    assert {file.name for file in path.iterdir()} == {"folder.lock"}


def check_shards(path: Path, max_bytes: int) -> None:
    shards = list(path.glob("*.tar"))
    assert shards
    for shard in shards:
        assert hashlib.sha256(shard.read_bytes()).hexdigest() == shard.stem
    assert sum(shard.stat().st_size for shard in shards) <= max_bytes
