"""Files that all loader workers of a node need whole: fetched by one of them, read by the others.

They lie in the folder of the shard cache under its rules (locks, room, eviction), named by a hash
of what they are, as their own is not known before they are read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time

from fqgan_dist.data.cache_folder import CacheFolder, Claim, Refusal
from fqgan_dist.data.config import ShardCacheConfig
from fqgan_dist.storage.storage import Storage

_POLL_S = 0.02
# Longer than a fetch of such a file takes: then it is read from the store.
_PATIENCE_S = 60.0

_logger = logging.getLogger(__name__)


class NodeCopies:
    """One process's view of the copies; safe to use from several threads."""

    def __init__(self, config: ShardCacheConfig) -> None:
        """Name the folder; nothing is touched before a file is read."""
        self._folder = CacheFolder.of(config)
        self._is_usable = True

    def read(self, storage: Storage, path: str, identity: str) -> bytes:
        """Read a file of a store, from its copy on this node if there is one or can be.

        Args:
            storage: the store.
            path: the file, which never changes as long as `identity` is the same.
            identity: what was computed from what.

        Raises:
            FileNotFoundError: the store has no such file.
        """
        if self._is_usable:
            size = storage.size(path)  # a copy of another size is none of this file
            try:
                return self._read(storage, path, _name(storage, path, identity), size)
            except OSError as error:  # of the folder: what the store lacks shows below
                self._is_usable = False
                _logger.warning(
                    "%s: cannot be used (%s); every process reads from the store for itself",
                    self._folder.path,
                    error,
                )
        return storage.read_bytes(path)

    def drop(self, storage: Storage, path: str, identity: str) -> None:
        """Remove a copy that is damaged."""
        try:
            self._folder.drop(_name(storage, path, identity))
        except OSError:
            self._is_usable = False

    def _read(self, storage: Storage, path: str, name: str, size: int) -> bytes:
        self._folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if (data := self._read_copy(name, size)) is not None:
                return data
            claim, _ = self._folder.claim(name, size)
            if isinstance(claim, Claim):
                with claim:
                    data = storage.read_bytes(path)
                    if len(data) == size:
                        claim.part.write_bytes(data)
                        claim.publish()
                    return data
            if claim in (Refusal.NO_ROOM, Refusal.DISK_LOW):
                break
            time.sleep(_POLL_S)  # another process fetches it, or has just done so
        return storage.read_bytes(path)

    def _read_copy(self, name: str, size: int) -> bytes | None:
        descriptor = self._folder.open(name, size)
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            return file.read()


def _name(storage: Storage, path: str, identity: str) -> str:
    return hashlib.sha256(f"{storage.uri(path)}\n{identity}".encode()).hexdigest()
