"""The proof that a process sees the driver's storage root; the cluster's side is tested on Ray."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from fqgan_dist.errors import ClusterError
from fqgan_dist.orchestration.shared_root import SharedRoot
from fqgan_dist.storage.storage import Storage


def test_a_process_that_sees_the_probe_passes(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_bytes("probe", b"")
    pickle.loads(pickle.dumps(SharedRoot(storage, "probe"))).check()


def test_a_process_with_another_file_system_is_told_what_to_use(tmp_path: Path) -> None:
    root = SharedRoot(Storage(tmp_path / "root"), "probe")
    with pytest.raises(ClusterError, match=r"storage\.root: .*not seen on this node.*s3://"):
        root.check()
