from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support.synthetic_shards import flip_byte, publish_dataset
from support.waiting import wait_until

from fqgan_dist.data.cache_folder import CacheFolder
from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex
from fqgan_dist.data.shard_cache import ShardCache
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.storage import Storage

COUNTS = (4, 4, 4)
TESTS = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "store")


@pytest.fixture
def index(store: Storage) -> DatasetIndex:
    return publish_dataset(store, COUNTS)


@pytest.fixture
def config(tmp_path: Path) -> ShardCacheConfig:
    return ShardCacheConfig(folder=tmp_path / "cache", max_gib=1, min_free_gib=0)


def fill(cache: ShardCache, shard: int) -> None:
    """Have a shard fetched and wait for it."""
    assert cache.read(shard, [(0, 5)]) is None
    wait_until(lambda: cache.read(shard, [(0, 1)]) is not None)


def wait_idle(cache: ShardCache) -> None:
    wait_until(lambda: cache._thread is None)


def cached_files(config: ShardCacheConfig) -> set[str]:
    return {file.name for file in config.find_folder().glob("*.tar")}


def test_shard_is_streamed_first_and_then_read_from_the_disk(
    store: Storage, index: DatasetIndex, config: ShardCacheConfig
) -> None:
    cache = ShardCache(Dataset(store, index), config)
    assert cache.read(1, [(3, 5)]) is None
    wait_idle(cache)
    data = store.read_bytes(index.shards[1].file)
    assert cache.read(1, [(3, 5), (0, 600)]) == [data[3:8], data[:600]]
    assert cached_files(config) == {f"{index.shards[1].sha256}.tar"}
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.bytes) == (2, 1, 605)
    assert stats.fetched_bytes == index.shards[1].bytes
    assert (stats.evictions, stats.damaged) == (0, 0)
    cache.close()


def test_another_job_finds_what_the_first_one_fetched(
    store: Storage, index: DatasetIndex, config: ShardCacheConfig
) -> None:
    first = ShardCache(Dataset(store, index), config)
    fill(first, 0)
    second = ShardCache(Dataset(store, index), config)
    assert second.read(0, [(0, 9)]) is not None
    first.close()
    second.close()


def test_latest_request_is_fetched_first(
    index: DatasetIndex, config: ShardCacheConfig, tmp_path: Path
) -> None:
    store = Gate(tmp_path / "store")
    cache = ShardCache(Dataset(store, index), config)
    cache.request([0])
    store.wait_for_fetch()
    cache.request([2, 1])
    store.open_gate()
    wait_idle(cache)
    assert store.fetched == [index.shards[shard].file for shard in (0, 1, 2)]
    cache.close()


def test_reader_does_not_wait_for_a_fetch(
    index: DatasetIndex, config: ShardCacheConfig, tmp_path: Path
) -> None:
    store = Gate(tmp_path / "store")
    cache = ShardCache(Dataset(store, index), config)
    cache.request([0])
    store.wait_for_fetch()
    assert cache.read(0, [(0, 1)]) is None  # returns, with the gate still closed
    store.open_gate()
    wait_until(lambda: cache.read(0, [(0, 1)]) is not None)
    cache.close()


def test_what_does_not_fit_is_streamed(
    store: Storage,
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    small = config.model_copy(update={"max_gib": 2.5 * index.shards[0].bytes / 2**30})
    cache = ShardCache(Dataset(store, index), small)
    for shard in (0, 1, 2, 0, 1, 2):
        cache.read(shard, [(0, 1)])
        wait_idle(cache)
    assert cached_files(config) == {f"{index.shards[shard].sha256}.tar" for shard in (0, 1)}
    assert (cache.stats().hits, cache.stats().evictions) == (2, 0)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "full of shards of datasets in use" in caplog.text
    cache.close()


def test_closed_cache_lets_another_dataset_have_its_room(
    store: Storage, index: DatasetIndex, config: ShardCacheConfig
) -> None:
    small = config.model_copy(update={"max_gib": 1.5 * index.shards[0].bytes / 2**30})
    other = publish_dataset(store.child("other"), COUNTS, seed=1)
    first = ShardCache(Dataset(store, index), small)
    fill(first, 0)
    first.close()
    second = ShardCache(Dataset(store.child("other"), other), small)
    fill(second, 0)
    assert second.stats().evictions == 1
    assert first.read(0, [(0, 1)]) is None
    second.close()


class Gate(Storage):
    """A store that holds every fetch until it is opened, or until the reader has had enough."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self.fetched: list[str] = []
        self._arrived = threading.Event()
        self._opened = threading.Event()

    def download(
        self, path: str, target: Path, *, progress: Callable[..., Any] | None = None
    ) -> tuple[str, int]:
        self._arrived.set()
        while not self._opened.wait(0.005):
            assert progress is not None
            progress(1)
        self.fetched.append(path)
        return super().download(path, target, progress=progress)

    def wait_for_fetch(self) -> None:
        assert self._arrived.wait(60)

    def open_gate(self) -> None:
        self._opened.set()


def test_whoever_waits_finds_the_shards_there(
    index: DatasetIndex, config: ShardCacheConfig, tmp_path: Path
) -> None:
    store = Gate(tmp_path / "store")
    cache = ShardCache(Dataset(store, index), config)
    opener = threading.Thread(target=lambda: (store.wait_for_fetch(), store.open_gate()))
    opener.start()
    cache.wait_for([1, 0, 2], 600)
    assert store.fetched == [index.shards[shard].file for shard in (1, 0, 2)]
    assert all(cache.read(shard, [(0, 1)]) for shard in range(3))
    assert cache.stats().misses == 0
    opener.join()
    cache.close()


def test_waiting_ends_when_its_time_is_over(
    index: DatasetIndex, config: ShardCacheConfig, tmp_path: Path
) -> None:
    store = Gate(tmp_path / "store")
    cache = ShardCache(Dataset(store, index), config)
    cache.wait_for([0], 0.05)
    assert cache.read(0, [(0, 1)]) is None  # the gate is still closed
    cache.close()
    cache.wait_for([0], 600)  # nothing comes any more


def test_nobody_waits_for_what_is_not_coming(
    store: Storage, index: DatasetIndex, config: ShardCacheConfig
) -> None:
    small = config.model_copy(update={"max_gib": 0.5 * index.shards[0].bytes / 2**30})
    cache = ShardCache(Dataset(store, index), small)
    cache.wait_for([0, 1], 600)  # there is no room
    cache.close()
    store.delete(index.shards[2].file)
    cache = ShardCache(Dataset(store, index), config)
    cache.wait_for([2], 600)  # it cannot be fetched
    cache.close()


@pytest.mark.parametrize("other_ends_well", [True, False])
def test_what_another_process_fetches_is_waited_for(
    index: DatasetIndex, config: ShardCacheConfig, tmp_path: Path, other_ends_well: bool
) -> None:
    theirs, ours = Gate(tmp_path / "store"), Gate(tmp_path / "store")
    ours.open_gate()
    other = ShardCache(Dataset(theirs, index), config)
    other.request([0])
    theirs.wait_for_fetch()
    end = theirs.open_gate if other_ends_well else other.close
    threading.Timer(0.2, end).start()
    cache = ShardCache(Dataset(ours, index), config)
    cache.wait_for([0], 600)
    assert cache.read(0, [(0, 1)]) is not None
    assert ours.fetched == ([] if other_ends_well else [index.shards[0].file])
    cache.close()
    other.close()


def test_closing_stops_a_fetch_under_way(
    index: DatasetIndex, config: ShardCacheConfig, tmp_path: Path
) -> None:
    store = Gate(tmp_path / "store")
    cache = ShardCache(Dataset(store, index), config)
    cache.request([0, 1, 2])
    store.wait_for_fetch()
    cache.close()
    assert cache._thread is None
    assert store.fetched == []
    cache.request([0])
    assert cache._thread is None
    assert {file.suffix for file in config.find_folder().iterdir()} == {".dataset", ".lock"}


def test_finalizer_stops_a_cache_whose_lock_is_held(
    store: Storage, index: DatasetIndex, config: ShardCacheConfig
) -> None:
    cache = ShardCache(Dataset(store, index), config)
    with cache._lock:  # as by the thread that garbage is collected in
        stopping = threading.Thread(target=cache.stop, daemon=True)
        stopping.start()
        stopping.join(10)
        assert not stopping.is_alive()
    cache.request([0])
    assert cache._thread is None


class FullDisk(Storage):
    """A store whose downloads end as they do where the local disk is full."""

    number = errno.ENOSPC

    def download(
        self, path: str, target: Path, *, progress: Callable[..., Any] | None = None
    ) -> tuple[str, int]:
        target.write_bytes(b"what still fitted")
        raise OSError(self.number, os.strerror(self.number), str(target))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_degrades_to_streaming_with_one_warning(
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    number: int,
) -> None:
    store = FullDisk(tmp_path / "store")
    store.number = number
    check_streams_with_one_warning(store, index, config, caplog, "the disk is full")
    assert not list(config.find_folder().glob("*.part"))


def test_disk_below_its_reserve_degrades_to_streaming_with_one_warning(
    store: Storage,
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    greedy = config.model_copy(update={"min_free_gib": 2.0**30})
    check_streams_with_one_warning(store, index, greedy, caplog, "the disk is full")


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_unusable_folder_degrades_to_streaming_with_one_warning(
    store: Storage,
    index: DatasetIndex,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    name: str,
) -> None:
    # Not a folder without write permission: tests may run as root, who may write everywhere.
    (tmp_path / "file").write_text("no folder")
    config = ShardCacheConfig(folder=tmp_path / name, min_free_gib=0)
    check_streams_with_one_warning(store, index, config, caplog, "it cannot be used")


def check_streams_with_one_warning(
    store: Storage,
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    cache = ShardCache(Dataset(store, index), config)
    for shard in (0, 1, 2, 0):
        assert cache.read(shard, [(0, 1)]) is None
        wait_idle(cache)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(f"shard cache {config.find_folder()}: {reason}")
    assert f"read from {store.root}" in messages[0]
    assert "data.cache.folder" in messages[0]
    cache.close()


def test_shard_that_is_damaged_where_it_is_stored_is_never_cached(
    store: Storage,
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fqgan_dist.data.shard_cache._FAILED_RETRY_S", 0.0)
    flip_byte(store, index.shards[0].file, 700)
    cache = ShardCache(Dataset(store, index), config)
    for _ in range(4):
        assert cache.read(0, [(0, 1)]) is None
        wait_idle(cache)
    assert cached_files(config) == set()
    assert cache.stats().damaged == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all("shard-000000.tar: what arrived has sha256" in message for message in messages)
    assert "fqgan-data verify" in messages[1]
    cache.close()


def test_shard_that_cannot_be_fetched_is_tried_again_later(
    store: Storage,
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = store.read_bytes(index.shards[0].file)
    store.delete(index.shards[0].file)
    cache = ShardCache(Dataset(store, index), config)
    for _ in range(3):
        assert cache.read(0, [(0, 1)]) is None
        wait_idle(cache)
    assert caplog.text.count("shard-000000.tar: cannot be fetched into the cache") == 1
    store.write_bytes(index.shards[0].file, data)
    monkeypatch.setattr(cache, "_retry_at", {})
    fill(cache, 0)
    cache.close()


def test_folder_that_vanishes_is_named(
    store: Storage,
    index: DatasetIndex,
    config: ShardCacheConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = ShardCache(Dataset(store, index), config)
    fill(cache, 0)
    wait_idle(cache)
    # It may have been asked for once more, and then been found there: not again for a while.
    monkeypatch.setattr(cache, "_retry_at", {})
    for file in config.find_folder().iterdir():
        file.unlink()
    config.find_folder().rmdir()
    assert cache.read(0, [(0, 1)]) is None
    wait_idle(cache)
    assert "it cannot be used" in caplog.text
    cache.close()


FULL_DISKS = """
for inodes in 1 2 3 4; do
    mkdir "$1/$inodes" && mount -t tmpfs -o nr_inodes=$inodes tmpfs "$1/$inodes" || exit 77
done
exec "$2" -c '
import logging, sys
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.shard_cache import ShardCache
from fqgan_dist.storage.storage import Storage
from support.waiting import wait_until

logging.basicConfig(format="%(message)s", stream=sys.stdout)
dataset = Dataset.open(Storage(sys.argv[2]))
for inodes in (1, 2, 3, 4):
    config = ShardCacheConfig(folder=f"{sys.argv[1]}/{inodes}", max_gib=1, min_free_gib=0)
    cache = ShardCache(dataset, config)
    for shard in (0, 1, 0):
        assert cache.read(shard, [(0, 1)]) is None
        wait_until(lambda: cache._thread is None)
    cache.close()
' "$1" "$3"
"""


def test_really_full_disks_degrade_to_streaming_with_one_warning(
    store: Storage, index: DatasetIndex, tmp_path: Path
) -> None:
    # Small disks without a place for the lock of the folder, the dataset, the lock of the shard,
    # or the shard: each is full at another point of a fetch, though it has free bytes.
    mounts = tmp_path / "mounts"
    mounts.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISKS, "sh"]
    result = subprocess.run(
        [*unshare, str(mounts), sys.executable, store.root],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for line, inodes in zip(lines, (1, 2, 3, 4), strict=True):
        assert line.startswith(f"shard cache {mounts}/{inodes}: the disk is full")


def test_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert ShardCacheConfig().find_folder() == Path("/somewhere/cache/fqgan_dist/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert ShardCacheConfig().find_folder() == Path("/home/user/.cache/fqgan_dist/shards")
    assert ShardCacheConfig(folder=Path("~/x")).find_folder() == Path("/home/user/x")


def test_user_without_a_home_must_name_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(ConfigError, match=r"data.cache.folder: .* name a folder"):
        ShardCacheConfig().find_folder()


@pytest.mark.parametrize(
    "values", [{"folder": "s3://bucket/x"}, {"max_gib": 0}, {"min_free_gib": -1}]
)
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ShardCacheConfig.model_validate(values)


def test_dataset_is_in_use_until_its_reader_is_gone(
    store: Storage, index: DatasetIndex, config: ShardCacheConfig
) -> None:
    folder = CacheFolder(config.find_folder(), max_bytes=1, min_free_bytes=0)
    cache = ShardCache(Dataset(store, index), config)
    fill(cache, 0)
    wait_idle(cache)
    assert folder._find_shards_in_use() == {shard.sha256 for shard in index.shards}
    del cache  # forgotten without `close`
    assert folder._find_shards_in_use() == set()
