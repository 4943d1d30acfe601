"""Of many readers of one file on a node one asks the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.node_copies import NodeCopies
from fqgan_dist.storage.storage import Storage

DATA = bytes(range(256)) * 100


class CountingStorage(Storage):
    """Counts whole reads."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.num_reads = 0
        self.lock = threading.Lock()

    def read_bytes(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self.lock:
            self.num_reads += 1
        return super().read_bytes(path, offset=offset, length=length)


@pytest.fixture
def storage(tmp_path: Path) -> CountingStorage:
    found = CountingStorage(tmp_path / "store")
    found.write_bytes("features/0", DATA)
    return found


def open_copies(tmp_path: Path, **settings: float) -> NodeCopies:
    values = {"min_free_gib": 0, **settings}
    return NodeCopies(ShardCacheConfig(folder=tmp_path / "cache", **values))


def test_many_readers_read_the_store_once(tmp_path: Path, storage: CountingStorage) -> None:
    start = threading.Barrier(16)

    def read(_: int) -> bytes:
        own = open_copies(tmp_path)  # as each loader worker has
        start.wait()
        return own.read(storage, "features/0", "x")

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(read, range(16))) == {DATA}
    assert storage.num_reads == 1


def test_other_content_is_another_copy(tmp_path: Path, storage: CountingStorage) -> None:
    copies = open_copies(tmp_path)
    for identity in ("x", "y", "x"):
        assert copies.read(storage, "features/0", identity) == DATA
    assert storage.num_reads == 2


@pytest.mark.parametrize("damage", [b"x", DATA[:-1] + b"x"])
def test_a_copy_that_was_changed_is_fetched_again(
    tmp_path: Path, storage: CountingStorage, damage: bytes
) -> None:
    open_copies(tmp_path).read(storage, "features/0", "x")
    (copy,) = (tmp_path / "cache").glob("*.tar")
    copy.write_bytes(damage)
    assert open_copies(tmp_path).read(storage, "features/0", "x") == DATA
    assert storage.num_reads == 2


def test_a_dropped_copy_is_fetched_again(tmp_path: Path, storage: CountingStorage) -> None:
    copies = open_copies(tmp_path)
    copies.read(storage, "features/0", "x")
    copies.drop(storage, "features/0", "x")
    assert copies.read(storage, "features/0", "x") == DATA
    assert storage.num_reads == 2


def test_without_room_the_store_is_read(tmp_path: Path, storage: CountingStorage) -> None:
    copies = open_copies(tmp_path, max_gib=1e-9)
    for count in (1, 2):
        assert copies.read(storage, "features/0", "x") == DATA
        assert storage.num_reads == count


def test_a_folder_that_cannot_be_used_is_said_once(
    tmp_path: Path, storage: CountingStorage, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    copies = open_copies(tmp_path)
    assert copies.read(storage, "features/0", "x") == DATA
    assert copies.read(storage, "features/0", "x") == DATA
    assert len(caplog.records) == 1


def test_a_missing_file_is_missing(tmp_path: Path, storage: CountingStorage) -> None:
    with pytest.raises(FileNotFoundError, match="no such object"):
        open_copies(tmp_path).read(storage, "features/1", "x")


def test_a_folder_that_vanishes_is_not_a_missing_file(
    tmp_path: Path, storage: CountingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = open_copies(tmp_path)

    def vanish(*_: object) -> None:
        raise FileNotFoundError(tmp_path / "cache")

    monkeypatch.setattr(copies._folder, "claim", vanish)
    assert copies.read(storage, "features/0", "x") == DATA
