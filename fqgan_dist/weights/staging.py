"""Bringing weights files of pretrained networks to this machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import is_remote
from fqgan_dist.storage.storage import Storage, locate_file
from fqgan_dist.weights.config import WeightsConfig


def resolve_weights(config: WeightsConfig, *, field: str) -> Path | None:
    """Return a local file with the configured weights, None for `hub` and `random`.

    A file in object storage is copied to the user's cache once, under the hash of its bytes.

    Args:
        config: settings of the weights.
        field: where they stand in the run's config, for messages.

    Raises:
        ConfigError: there is no such file.
        DataError: it cannot be read.
    """
    return bring_file(config.source, field=f"{field}.source") if config.is_file else None


def bring_file(source: str, *, field: str) -> Path:
    """Return a local file with the bytes of a file or object.

    Args:
        source: path or URI.
        field: the setting that names it, for messages.

    Raises:
        ConfigError: there is no such file.
        DataError: it cannot be read.
    """
    if not is_remote(source):
        path = Path(source)
        if not path.is_file():
            raise ConfigError(
                f"{field}: {source!r}: no such file; expected a safetensors file (path or s3:// "
                f"URI), or 'random' for a trial"
            )
        return path
    folder, name = locate_file(source)
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{field}: {source!r}: no such object") from error
    cache = Storage(_cache_folder())
    cached = f"{hashlib.sha256(data).hexdigest()}.safetensors"
    if not cache.exists(cached):
        cache.write_bytes(cached, data)
    path = cache.local_path(cached)
    assert path is not None, "the cache is a local folder"
    return path


def is_missing(source: str) -> bool:
    """Whether a path is not there; objects in buckets are left to their readers."""
    return not is_remote(source) and not Path(source).exists()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fqgan_dist" / "weights"
