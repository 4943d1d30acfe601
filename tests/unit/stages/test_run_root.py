from __future__ import annotations

import stat
from pathlib import Path

from support.tiny_tasks import load_tiny

from fqgan_dist.stages.run import open_run
from fqgan_dist.world import World


def test_a_new_root_is_closed_to_other_users(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "mine"
    open_run(load_tiny(f"storage.root={root}"), World())
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
