from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fqgan_dist.data.cache_folder import CacheFolder, Claim, Refusal
from fqgan_dist.storage.leftovers import Swept

SIZE = 1000

OTHER_PROCESS = """
import sys
from pathlib import Path
from fqgan_dist.data.cache_folder import CacheFolder

path, dataset, claimed, size = sys.argv[1:]
folder = CacheFolder(Path(path), max_bytes=10**9, min_free_bytes=0)
use = folder.join(dataset, [claimed])
if int(size):
    claim, _ = folder.claim(claimed, int(size))
    claim.part.write_bytes(b"half")
print("ready", flush=True)
sys.stdin.read()
"""


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


SHARDS = [sha256_of(content(number)) for number in range(6)]
DATASETS = ["a" * 64, "b" * 64, "c" * 64]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_folder(path: Path, *, max_shards: float = 100, min_free: int = 0) -> CacheFolder:
    return CacheFolder(path, max_bytes=int(max_shards * SIZE), min_free_bytes=min_free)


def put(folder: CacheFolder, number: int) -> Refusal | int:
    """Put a shard into the folder; return why not, or the number of evictions."""
    claim, evicted = folder.claim(SHARDS[number], SIZE)
    if not isinstance(claim, Claim):
        return claim
    with claim:
        claim.part.write_bytes(content(number))
        claim.publish()
    return evicted


def use_at(folder: CacheFolder, number: int, seconds: float) -> None:
    """Make a shard one that was last used at a time."""
    file = folder.path / f"{SHARDS[number]}.tar"
    os.utime(file, ns=(int(seconds * 1e9), file.stat().st_mtime_ns))


def cached(folder: CacheFolder) -> set[int]:
    return {
        number for number, sha256 in enumerate(SHARDS) if (folder.path / f"{sha256}.tar").exists()
    }


def read(folder: CacheFolder, number: int) -> bytes | None:
    descriptor = folder.open(SHARDS[number], SIZE)
    if descriptor is None:
        return None
    with open(descriptor, "rb") as file:
        return file.read()


@contextmanager
def other_process(
    path: Path, dataset: str, shard: str, *, claim: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """A process that reads a dataset and, if `claim` bytes are given, fetches its one shard."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(path), dataset, shard, str(claim)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_shard_is_there_once_it_is_published(path: Path) -> None:
    folder = open_folder(path)
    use = folder.join(DATASETS[0], SHARDS)
    assert read(folder, 0) is None
    claim, _ = folder.claim(SHARDS[0], SIZE)
    assert isinstance(claim, Claim)
    with claim:
        claim.part.write_bytes(content(0))
        assert read(folder, 0) is None
        claim.publish()
    assert read(folder, 0) == content(0)
    assert folder.claim(SHARDS[0], SIZE) == (Refusal.PRESENT, 0)
    use.close()


def test_only_the_shards_and_the_datasets_stay_in_the_folder(path: Path) -> None:
    folder = open_folder(path)
    use = folder.join(DATASETS[0], SHARDS)
    put(folder, 0)
    claim, _ = folder.claim(SHARDS[1], SIZE)
    assert isinstance(claim, Claim)
    with claim:  # and give up
        claim.part.write_bytes(b"half")
    names = {file.name for file in path.iterdir()}
    assert names == {f"{SHARDS[0]}.tar", f"{DATASETS[0]}.dataset", "folder.lock"}
    use.close()


@pytest.mark.parametrize("data", [b"", content(1), content(0)[:-1], content(0) + b"x"])
def test_file_that_was_changed_is_removed(path: Path, data: bytes) -> None:
    folder = open_folder(path)
    use = folder.join(DATASETS[0], SHARDS)
    put(folder, 0)
    (path / f"{SHARDS[0]}.tar").write_bytes(data)
    assert read(folder, 0) is None
    assert cached(folder) == set()
    assert put(folder, 0) == 0
    use.close()


def test_one_process_fetches_a_shard(path: Path) -> None:
    folder = open_folder(path)
    with other_process(path, DATASETS[0], SHARDS[0], claim=SIZE):
        assert folder.claim(SHARDS[0], SIZE) == (Refusal.BUSY, 0)


def test_killed_process_leaves_nothing_that_hinders(path: Path) -> None:
    folder = open_folder(path, max_shards=1)
    with other_process(path, DATASETS[0], SHARDS[0], claim=SIZE):
        assert list(path.glob("*.part"))
    use = folder.join(DATASETS[1], SHARDS)
    # The other's reservation is gone, and with it what it wrote, whatever is fetched next.
    assert put(folder, 1) == 0
    assert not list(path.glob("*.part"))
    assert [file.name for file in path.glob("*.lock")] == ["folder.lock"]
    use.close()


def test_a_sweep_removes_what_killed_processes_fetched_and_nothing_else(path: Path) -> None:
    folder = open_folder(path)
    assert folder.sweep() == Swept()
    assert not path.exists()
    with other_process(path, DATASETS[0], SHARDS[0], claim=SIZE):
        assert folder.sweep() == Swept()
        assert list(path.glob("*.part"))
    assert folder.sweep() == Swept(1, len(b"half"))
    assert not list(path.glob("*.part"))


def test_reserved_bytes_count(path: Path) -> None:
    folder = open_folder(path, max_shards=1.5)
    use = folder.join(DATASETS[1], SHARDS)
    with other_process(path, DATASETS[0], SHARDS[0], claim=SIZE):
        assert put(folder, 1) is Refusal.NO_ROOM
    assert put(folder, 1) == 0
    use.close()


def test_shards_of_the_dataset_being_read_are_not_evicted_for_each_other(path: Path) -> None:
    folder = open_folder(path, max_shards=2)
    use = folder.join(DATASETS[0], SHARDS)
    assert [put(folder, number) for number in range(3)] == [0, 0, Refusal.NO_ROOM]
    assert cached(folder) == {0, 1}
    use.close()


def test_unused_shards_are_evicted_oldest_use_first(path: Path) -> None:
    folder = open_folder(path, max_shards=3)
    former = folder.join(DATASETS[0], SHARDS[:3])
    for number, used in enumerate((200.0, 100.0, 300.0)):
        put(folder, number)
        use_at(folder, number, used)
    former.close()
    use = folder.join(DATASETS[1], SHARDS[3:])
    assert put(folder, 3) == 1
    assert cached(folder) == {0, 2, 3}
    assert put(folder, 4) == 1
    assert cached(folder) == {2, 3, 4}
    use.close()


def test_opening_counts_as_a_use(path: Path) -> None:
    folder = open_folder(path, max_shards=2)
    former = folder.join(DATASETS[0], SHARDS[:2])
    for number in range(2):
        put(folder, number)
        use_at(folder, number, 100.0 + number)
    descriptor = folder.open(SHARDS[0], SIZE)
    assert descriptor is not None
    os.close(descriptor)  # nothing was read: the record is ours, disks may be mounted "noatime"
    former.close()
    use = folder.join(DATASETS[1], SHARDS[2:])
    put(folder, 2)
    assert cached(folder) == {0, 2}
    use.close()


def test_shards_that_a_living_process_reads_are_kept_until_it_dies(path: Path) -> None:
    folder = open_folder(path, max_shards=1)
    use = folder.join(DATASETS[1], SHARDS[1:])
    with other_process(path, DATASETS[0], SHARDS[0]):
        assert put(folder, 0) == 0
        assert put(folder, 1) is Refusal.NO_ROOM
    assert put(folder, 1) == 1
    assert cached(folder) == {1}
    use.close()


def test_shard_of_two_datasets_is_kept_while_one_is_read(path: Path) -> None:
    # An extended dataset holds the shards of the former one.
    folder = open_folder(path, max_shards=2)
    former = folder.join(DATASETS[0], SHARDS[:2])
    put(folder, 0)
    put(folder, 1)
    extended = folder.join(DATASETS[1], SHARDS[1:])
    former.close()
    assert put(folder, 2) == 1
    assert cached(folder) == {1, 2}
    extended.close()


def test_nothing_is_evicted_where_it_does_not_help(path: Path) -> None:
    folder = open_folder(path, max_shards=2)
    former = folder.join(DATASETS[0], SHARDS[:1])
    put(folder, 0)
    former.close()
    claim, evicted = folder.claim(SHARDS[1], 3 * SIZE)
    assert (claim, evicted) == (Refusal.NO_ROOM, 0)
    assert cached(folder) == {0}


def test_evicted_file_that_is_open_stays_readable(path: Path) -> None:
    folder = open_folder(path)
    use = folder.join(DATASETS[0], SHARDS)
    put(folder, 0)
    descriptor = folder.open(SHARDS[0], SIZE)
    assert descriptor is not None
    folder.drop(SHARDS[0])
    assert cached(folder) == set()
    with open(descriptor, "rb") as file:
        assert file.read() == content(0)
    use.close()


def test_space_on_the_disk_is_left_free(path: Path) -> None:
    folder = open_folder(path, min_free=2**62)
    use = folder.join(DATASETS[0], SHARDS)
    assert put(folder, 0) is Refusal.DISK_LOW
    use.close()


def test_other_files_in_the_folder_are_left_alone(path: Path) -> None:
    path.mkdir()
    for name in ("notes.txt", "x.tar", "x.dataset", "x.lock", f"{'a' * 64}.x.lock"):
        (path / name).write_bytes(b"x" * 5 * SIZE)
    folder = open_folder(path, max_shards=1)
    use = folder.join(DATASETS[0], SHARDS[:1])
    assert put(folder, 0) == 0
    use.close()
    assert put(folder, 1) == 1
    assert len(list(path.glob("x.*"))) == 3
    assert (path / "notes.txt").exists()


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    path.mkdir()
    (tmp_path / "secret").write_bytes(content(0))
    folder = open_folder(path)
    for name, call in (
        (f"{SHARDS[0]}.tar", lambda: folder.open(SHARDS[0], SIZE)),
        (f"{DATASETS[0]}.dataset", lambda: folder.join(DATASETS[0], SHARDS)),
        ("folder.lock", lambda: folder.claim(SHARDS[1], SIZE)),
    ):
        (path / "folder.lock").unlink(missing_ok=True)
        (path / name).symlink_to(tmp_path / "secret")
        with pytest.raises(OSError, match="symbolic links"):
            call()
