from __future__ import annotations

import hashlib
import io
from pathlib import Path

from fqgan_dist.storage.hashing import HashedStream, hash_object
from fqgan_dist.storage.storage import Storage

DATA = bytes(range(256)) * 40_000  # more than one block


def test_an_object_is_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    assert hash_object(Storage(tmp_path), "x") == (hashlib.sha256(DATA).hexdigest(), len(DATA))


def test_what_is_read_and_what_is_left_are_hashed() -> None:
    stream = HashedStream(io.BytesIO(DATA))
    assert stream.read(1000) == DATA[:1000]
    assert stream.num_bytes == 1000
    assert stream.finish() == (hashlib.sha256(DATA).hexdigest(), len(DATA))
