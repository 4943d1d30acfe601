"""Whole shards of a dataset on a local disk, fetched in the background while samples are streamed.

Reading never waits: a shard that is not there yet is fetched by a thread of one process of the
node, and until then its samples are read from the store by ranges. Who begins with a cold cache may
wait a while for the first shards, so as not to read them twice. Shards of datasets in use are
not evicted for each other: a reader that goes round and round would evict each shard just before it
needs it again. So what does not fit stays streamed, and the rest is read from the disk.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fqgan_dist.data.cache_folder import CacheFolder, Claim, DatasetUse, Refusal
from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import ShardEntry
from fqgan_dist.errors import DataError

_logger = logging.getLogger(__name__)

_BUSY_RETRY_S = 1.0
"""When a shard that another process is fetching is asked for again: it may have died."""
_PAUSE_S = 60.0
"""When a full cache or disk, or a useless folder, is tried again: another job may have ended."""
_FAILED_RETRY_S = 30.0
_MAX_DAMAGED_COPIES = 2
"""After so many copies with a wrong hash a shard is damaged where it is stored, not on the way."""
_CLOSE_TIMEOUT_S = 10.0
_POLL_S = 0.02
"""How often who waits looks for a shard that another process may be fetching."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class CacheStats:
    """What one process had of the cache since it opened it."""

    hits: int
    """Samples read from the disk."""
    misses: int
    """Samples whose shard was not there."""
    bytes: int
    """Bytes read from the disk."""
    fetched_bytes: int
    """Bytes of the shards that this process put into the cache."""
    evictions: int
    """Shards of unused datasets that it removed to make room."""
    damaged: int
    """Cached or arriving shards that it removed because their bytes were wrong."""


class ShardCache:
    """One process's view of the cache, for one dataset; safe to use from several threads."""

    def __init__(self, dataset: Dataset, config: ShardCacheConfig) -> None:
        """Name the cache; nothing is touched before a shard is asked for.

        Args:
            dataset: whose shards are cached.
            config: where the cache is and how large.
        """
        self._dataset = dataset
        self._shards = dataset.index.shards
        self._folder = CacheFolder.of(config)
        self._lock = threading.Lock()
        self._wanted: dict[int, None] = {}
        self._fetching: int | None = None
        self._fetched_elsewhere: set[int] = set()
        self._retry_at: dict[int, float] = {}
        self._paused_until = 0.0
        self._thread: threading.Thread | None = None
        self._use: DatasetUse | None = None
        self._stopping = False
        self._logged: set[str] = set()
        self._damaged_copies: dict[int, int] = {}
        self._counts: Counter[str] = Counter(dict.fromkeys(CacheStats.__dataclass_fields__, 0))

    def read(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Read parts of a cached shard.

        Args:
            shard: its number in the index.
            ranges: offset and length of each part; a part of a damaged file may be shorter.

        Returns:
            None: the shard is not there; it is being fetched, if it can be.
        """
        entry = self._shards[shard]
        try:
            parts = self._read_file(entry, ranges)
        except OSError as error:
            if error.errno == errno.EIO:  # the disk cannot read its own file
                self.drop(shard)
            parts = None  # whether the folder is of no use at all, fetching finds out
        if parts is None:
            self._count(misses=len(ranges))
            self.request([shard])
            return None
        self._count(hits=len(parts), bytes=sum(map(len, parts)))
        return parts

    def request(self, shards: Iterable[int]) -> None:
        """Ask for shards that are needed now or soon, the most urgent one last."""
        now = time.monotonic()
        with self._lock:
            # Nothing is remembered meanwhile: what is still needed then is asked for again, by
            # reading it.
            if self._stopping or now < self._paused_until:
                return
            for shard in shards:
                if self._retry_at.get(shard, 0.0) <= now:
                    # To the end, where the thread takes the next one: what was asked for last is
                    # needed first.
                    self._wanted.pop(shard, None)
                    self._wanted[shard] = None
            if self._wanted and self._thread is None:
                # It ends when nothing is wanted: an idle cache keeps no thread and no reference.
                self._thread = threading.Thread(
                    target=self._fetch_wanted, name="shard-cache", daemon=True
                )
                self._thread.start()

    def wait_for(self, shards: Sequence[int], seconds: float) -> None:
        """Ask for shards and wait until each is there, or is not coming, for a time at most."""
        deadline = time.monotonic() + seconds
        self.request(reversed(shards))
        for shard in shards:
            while not self._is_there(shard) and self._is_coming(shard):
                if time.monotonic() >= deadline:
                    return
                time.sleep(_POLL_S)

    def drop(self, shard: int) -> None:
        """Remove a shard of which a sample had wrong bytes; it is fetched again when needed."""
        entry = self._shards[shard]
        _logger.warning(
            "%s: the copy in the cache (%s) is damaged; it is removed and fetched again",
            self._dataset.folder.uri(entry.file),
            self._folder.path,
        )
        self._count(damaged=1)
        try:
            self._folder.drop(entry.sha256)
        except OSError as error:
            self._report_folder(error)

    def stats(self) -> CacheStats:
        """Return the counts so far."""
        with self._lock:
            return CacheStats(**self._counts)

    def stop(self) -> None:
        """Fetch nothing more; what is under way ends soon."""
        # Without the lock: this runs as a finalizer too, in whatever thread collects garbage, which
        # may hold it.
        self._stopping = True

    def close(self) -> None:
        """Stop fetching and let other jobs evict the dataset; reading is still allowed."""
        self.stop()
        thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_TIMEOUT_S)
        if self._use is not None:
            self._use.close()

    def _read_file(
        self, entry: ShardEntry, ranges: Sequence[tuple[int, int]]
    ) -> list[bytes] | None:
        descriptor = self._folder.open(entry.sha256, entry.bytes)
        if descriptor is None:
            return None
        try:
            return [os.pread(descriptor, length, offset) for offset, length in ranges]
        finally:
            os.close(descriptor)

    def _is_there(self, shard: int) -> bool:
        try:
            return self._read_file(self._shards[shard], []) is not None
        except OSError:
            return False  # whether the folder is of no use at all, fetching finds out

    def _is_coming(self, shard: int) -> bool:
        """Whether a shard is being fetched, or will be, by this process or another one."""
        with self._lock:
            if self._stopping or time.monotonic() < self._paused_until:
                return False
            if shard in self._wanted or shard == self._fetching:
                return True
            is_elsewhere = shard in self._fetched_elsewhere
        if is_elsewhere:
            self.request([shard])  # that process may have died
        return is_elsewhere

    def _fetch_wanted(self) -> None:
        """Fetch until nothing is wanted, the latest wish first: the reader is there now."""
        try:
            while (shard := self._pop_wanted()) is not None:
                try:
                    self._fetch(shard)
                except OSError as error:
                    self._report_folder(error)
        except BaseException:
            with self._lock:
                self._thread = self._fetching = None
            # At the end of the process the loop of the store's client may end before this thread.
            if not self._stopping and threading.main_thread().is_alive():
                raise

    def _pop_wanted(self) -> int | None:
        with self._lock:
            if self._wanted and not self._stopping:
                self._fetching = self._wanted.popitem()[0]
                return self._fetching
            # Under the same lock: whoever asks now starts a new thread.
            self._thread = self._fetching = None
            return None

    def _fetch(self, shard: int) -> None:
        entry = self._shards[shard]
        if self._use is None:
            self._use = self._folder.join(self._dataset.id, (each.sha256 for each in self._shards))
        claim, evicted = self._folder.claim(entry.sha256, entry.bytes)
        self._count(evictions=evicted)
        with self._lock:
            if claim is Refusal.BUSY:
                self._fetched_elsewhere.add(shard)
            else:
                self._fetched_elsewhere.discard(shard)
        match claim:
            case Refusal.PRESENT:
                self._retry_later(shard, _FAILED_RETRY_S)
            case Refusal.BUSY:
                self._retry_later(shard, _BUSY_RETRY_S)
            case Refusal.NO_ROOM | Refusal.DISK_LOW:
                self._stream_for_now(claim)
            case Claim():
                with claim:
                    self._download(shard, entry, claim)

    def _download(self, shard: int, entry: ShardEntry, claim: Claim) -> None:
        folder = self._dataset.folder
        uri = folder.uri(entry.file)
        try:
            sha256, size = folder.download(entry.file, claim.part, progress=self._check_stop)
        except _StoppedError:
            return
        except (DataError, FileNotFoundError) as error:  # of the store; the rest is of the disk
            self._retry_later(shard, _FAILED_RETRY_S)
            _logger.warning("%s: cannot be fetched into the cache: %s", uri, error)
            return
        if (sha256, size) != (entry.sha256, entry.bytes):
            self._refuse_copy(shard, entry, sha256, size)
            return
        claim.publish()
        self._count(fetched_bytes=size)

    def _refuse_copy(self, shard: int, entry: ShardEntry, sha256: str, size: int) -> None:
        self._count(damaged=1)
        copies = self._damaged_copies[shard] = self._damaged_copies.get(shard, 0) + 1
        is_final = copies >= _MAX_DAMAGED_COPIES
        self._retry_later(shard, float("inf") if is_final else _FAILED_RETRY_S)
        _logger.warning(
            "%s: what arrived has sha256 %s and %d bytes, the index has %s and %d; %s",
            self._dataset.folder.uri(entry.file),
            sha256,
            size,
            entry.sha256,
            entry.bytes,
            "the stored shard is damaged: run `fqgan-data verify`; it is not cached"
            if is_final
            else "it is fetched again later",
        )

    def _check_stop(self, *_: object) -> None:
        if self._stopping:
            raise _StoppedError

    def _retry_later(self, shard: int, seconds: float) -> None:
        with self._lock:
            self._retry_at[shard] = time.monotonic() + seconds

    def _stream_for_now(self, refusal: Refusal) -> None:
        """Do without the folder for a while, for a reason that may pass."""
        self._pause()
        if refusal is Refusal.NO_ROOM:  # as the user has set it
            self._log_once(logging.INFO, refusal.value, "data.cache.max_gib is the limit")
        else:
            advice = (
                "free space, lower data.cache.min_free_gib, or choose another data.cache.folder"
            )
            self._log_once(logging.WARNING, refusal.value, advice)

    def _report_folder(self, error: OSError) -> None:
        """Do without the folder for a while, which cannot be used."""
        if error.errno in _DISK_FULL:
            self._stream_for_now(Refusal.DISK_LOW)
            return
        self._pause()
        self._log_once(
            logging.WARNING,
            f"it cannot be used ({error})",
            "choose a data.cache.folder on a local disk that can be written",
        )

    def _pause(self) -> None:
        with self._lock:
            self._paused_until = time.monotonic() + _PAUSE_S
            self._wanted.clear()

    def _log_once(self, level: int, reason: str, advice: str) -> None:
        with self._lock:
            is_known = reason in self._logged
            self._logged.add(reason)
        if not is_known:
            _logger.log(
                level,
                "shard cache %s: %s; samples that are not in it are read from %s; %s",
                self._folder.path,
                reason,
                self._dataset.folder.root,
                advice,
            )

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._counts.update(amounts)


class _StoppedError(Exception):
    """The cache was closed while a shard was arriving."""
