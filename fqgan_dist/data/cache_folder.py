"""A folder of whole shards on a local disk, shared by all processes of a node and several jobs.

    <sha256>.tar              a shard whose bytes matched this hash when it was put here; or another
                              file (`node_copies`), by a hash of what it is
    <sha256>.<bytes>.lock     held while one process fetches that shard; reserves these bytes
    <sha256>.<bytes>.part     what has arrived of it
    <dataset id>.dataset      held, shared, by every process that reads the dataset; its shards
    folder.lock               held for moments: while space is reserved and names change

Only file locks (flock) say who does what, and the kernel lets go of a dead process's locks: there
is nothing to clean up after a crash but its `.part`, which the next one that reserves removes. No
shared memory, no server. A file that is removed while another process has it open stays readable.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.storage.leftovers import Swept

_SHARD = re.compile(r"([0-9a-f]{64})\.tar")
_CLAIM = re.compile(r"([0-9a-f]{64})\.([0-9]{1,18})\.lock")
_DATASET = re.compile(r"[0-9a-f]{64}\.dataset")
_HASH_LINE = re.compile(r"[0-9a-f]{64}")
_UNFINISHED_DATASET = ".dataset.part"
_FOLDER_LOCK = "folder.lock"

_VERIFIED_MTIME_NS = 10**18
"""Modification time given to a file once its bytes are verified: any later write moves it."""
_USE_RESOLUTION_S = 60.0
"""The access time is our record of the last use; it need not be more exact than this."""


class Refusal(Enum):
    """Why a shard is not to be fetched now."""

    PRESENT = "it is in the cache"
    BUSY = "another process is fetching it"
    NO_ROOM = "the cache is full of shards of datasets in use"
    DISK_LOW = "the disk is full"


class Claim:
    """The right of one process to put one shard into the folder; leaving it gives the right up."""

    def __init__(self, folder: CacheFolder, lock: Path, descriptor: int, shard: Path) -> None:
        self.part = lock.with_suffix(".part")
        """Where the shard's bytes go; not there yet."""
        self._folder = folder
        self._lock = lock
        self._descriptor = descriptor
        self._shard = shard

    def publish(self) -> None:
        """Give the verified `part` its name in the cache."""
        # Not synced: after a loss of power sizes, times and digests tell what is not whole.
        os.utime(self.part, ns=(time.time_ns(), _VERIFIED_MTIME_NS))
        os.replace(self.part, self._shard)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._folder.locked():
                # While the claim is still held: given up first, it might be another process's by
                # the time that these names go.
                self.part.unlink(missing_ok=True)
                self._lock.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


class DatasetUse:
    """Tells other processes, while it exists, that a dataset's shards are needed."""

    def __init__(self, descriptor: int) -> None:
        self._close = weakref.finalize(self, os.close, descriptor)

    def close(self) -> None:
        """Let others evict the dataset's shards."""
        self._close()


class CacheFolder:
    """The files; every method may be called from any process, and raises OSError."""

    def __init__(self, path: Path, *, max_bytes: int, min_free_bytes: int) -> None:
        """Name a folder without touching it.

        Args:
            path: the folder.
            max_bytes: what all shards in it may take together.
            min_free_bytes: what is left free on its disk.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes

    @staticmethod
    def of(config: ShardCacheConfig) -> CacheFolder:
        """Name the folder of a run's settings.

        Raises:
            ConfigError: it is not given, and the user has no home.
        """
        return CacheFolder(
            config.find_folder(),
            max_bytes=int(config.max_gib * 2**30),
            min_free_bytes=int(config.min_free_gib * 2**30),
        )

    def join(self, dataset_id: str, shards: Iterable[str]) -> DatasetUse:
        """Say that this process reads a dataset of these shards (sha256)."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.path / f"{dataset_id}.dataset"
        with self.locked():
            if not path.exists():
                written = self.path / f"{dataset_id}{_UNFINISHED_DATASET}"
                written.write_text("".join(f"{sha256}\n" for sha256 in sorted(set(shards))))
                os.replace(written, path)
            # Still under the folder's lock: who evicts removes the file of a dataset that nobody
            # holds.
            descriptor = _open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return DatasetUse(descriptor)

    def open(self, sha256: str, size: int) -> int | None:
        """Open a shard for reading; the caller closes the descriptor.

        Returns:
            None: it is not there, or was changed since it was verified, and is now removed.
        """
        try:
            descriptor = _open(self.path / f"{sha256}.tar", os.O_RDONLY)
        except FileNotFoundError:
            return None
        # Of the open file, not of its name, which may stand for another one by now.
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (size, _VERIFIED_MTIME_NS):
            os.close(descriptor)
            self.drop(sha256)
            return None
        if time.time() - status.st_atime > _USE_RESOLUTION_S:
            with suppress(PermissionError):  # of another user, who keeps the record
                os.utime(descriptor, ns=(time.time_ns(), _VERIFIED_MTIME_NS))
        return descriptor

    def drop(self, sha256: str) -> None:
        """Remove a shard that is damaged."""
        (self.path / f"{sha256}.tar").unlink(missing_ok=True)

    def claim(self, sha256: str, size: int) -> tuple[Claim | Refusal, int]:
        """Ask to fetch a shard; what killed processes left is removed first.

        Returns:
            The claim, for a `with` statement, or why there is none; and how many shards of datasets
            that nobody reads were evicted for it, those that were not used for longest first.
        """
        shard = self.path / f"{sha256}.tar"
        lock = self.path / f"{sha256}.{size}.lock"
        with self.locked():
            if shard.exists():
                return Refusal.PRESENT, 0
            claims = self._sweep_claims()
            if lock.name in claims:
                return Refusal.BUSY, 0
            refusal, evicted = self._make_room(size, claims)
            if refusal is not None:
                return refusal, evicted
            # Made and locked under the folder's lock: a sweep in between would take it for a dead
            # one's.
            descriptor = _open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
        return Claim(self, lock, descriptor, shard), evicted

    def sweep(self) -> Swept:
        """Remove what killed processes have left of fetching; else the next `claim` does so."""
        if not self.path.is_dir():
            return Swept()
        before = self._measure_parts()
        with self.locked():
            self._sweep_claims()
            left = self._measure_parts()
        gone = [size for name, size in before.items() if name not in left]
        return Swept(len(gone), sum(gone))

    def _measure_parts(self) -> dict[str, int]:
        return {
            name: _size_if_there(self.path / name)
            for name in os.listdir(self.path)
            if name.endswith(".part")
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock."""
        descriptor = _open(self.path / _FOLDER_LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _sweep_claims(self) -> dict[str, int]:
        """Return the bytes that live claims still have to write; remove dead claims."""
        claims: dict[str, int] = {}
        for name in os.listdir(self.path):
            match = _CLAIM.fullmatch(name)
            if match is None:
                continue
            lock = self.path / name
            part = lock.with_suffix(".part")
            if _is_held(lock):
                claims[name] = max(0, int(match[2]) - _size_if_there(part))
            else:
                part.unlink(missing_ok=True)
                lock.unlink(missing_ok=True)
        return claims

    def _make_room(self, size: int, claims: dict[str, int]) -> tuple[Refusal | None, int]:
        """Evict what nobody uses until a shard fits; nothing where even that is not enough."""
        shards = self._list_shards()
        claimed = sum(int(name.split(".")[1]) for name in claims)
        used = sum(shard.size for shard in shards) + claimed
        free = shutil.disk_usage(self.path).free - sum(claims.values())
        excess = max(used + size - self._max_bytes, self._min_free_bytes + size - free)
        if excess <= 0:
            return None, 0
        is_crowded = used + size > self._max_bytes
        needed = self._find_shards_in_use()
        unused = sorted(
            (shard for shard in shards if shard.sha256 not in needed), key=lambda shard: shard.used
        )
        if sum(shard.size for shard in unused) < excess:
            return Refusal.NO_ROOM if is_crowded else Refusal.DISK_LOW, 0
        evicted = 0
        while excess > 0:
            self.drop(unused[evicted].sha256)
            excess -= unused[evicted].size
            evicted += 1
        return None, evicted

    def _list_shards(self) -> list[_CachedShard]:
        shards: list[_CachedShard] = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                match = _SHARD.fullmatch(entry.name)
                if match is None:
                    continue
                with suppress(FileNotFoundError):  # dropped by a reader meanwhile
                    status = entry.stat(follow_symlinks=False)
                    shards.append(_CachedShard(match[1], status.st_size, status.st_atime_ns))
        return shards

    def _find_shards_in_use(self) -> set[str]:
        """Return the shards of datasets that a living process reads; forget the other datasets."""
        needed: set[str] = set()
        for name in os.listdir(self.path):
            path = self.path / name
            if name.endswith(_UNFINISHED_DATASET):
                path.unlink(missing_ok=True)  # its writer, who had the folder's lock, was killed
            if _DATASET.fullmatch(name) is None:
                continue
            if _is_held(path):
                needed.update(
                    _HASH_LINE.findall(path.read_text(encoding="ascii", errors="replace"))
                )
            else:
                path.unlink(missing_ok=True)
        return needed


class _CachedShard(NamedTuple):
    sha256: str
    size: int
    used: int


def _open(path: Path, flags: int) -> int:
    # No link of another user of a shared folder is followed.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _size_if_there(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # not begun, or published this moment
        return 0


def _is_held(path: Path) -> bool:
    """Whether a process, this one included, holds a lock on a file."""
    descriptor = _open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    else:
        return False
    finally:
        os.close(descriptor)
