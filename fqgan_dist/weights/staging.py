"""Bringing files of weights to this machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from torch import nn

from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import is_remote
from fqgan_dist.storage.storage import Storage, locate_file
from fqgan_dist.weights.config import WeightsConfig
from fqgan_dist.weights.files import load_safetensors_checked
from fqgan_dist.weights.tensors import load_into


def resolve_weights(config: WeightsConfig, *, field: str) -> Path | None:
    """Return a local file with the configured weights, None for `hub` and `random`.

    A file in object storage is copied to the user's cache once, under the hash of its bytes.

    Raises:
        ConfigError: there is no such file; `field` is where it stands in the config.
        DataError: it cannot be read.
    """
    if not config.is_file:
        return None
    source = config.source
    if not is_remote(source):
        path = Path(source)
        if not path.is_file():
            raise ConfigError(describe_missing_file(field, source))
        return path
    folder, name = locate_file(source)
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{field}.source: {source!r}: no such object") from error
    cache = Storage(_cache_folder())
    cached = f"{hashlib.sha256(data).hexdigest()}.safetensors"
    if not cache.exists(cached):
        cache.sweep()
        cache.write_bytes(cached, data)
    path = cache.local_path(cached)
    assert path is not None, "the cache is a local folder"
    return path


def load_initial_weights(module: nn.Module, config: WeightsConfig | None, *, field: str) -> None:
    """Copy the weights that a training starts from into a module; None leaves it as it is.

    Raises:
        ConfigError: there is no such file.
        DataError: it is damaged, or of another architecture: names and shapes that differ are told.
    """
    if config is None:
        return
    path = resolve_weights(config, field=field)
    assert path is not None, "RunConfig allows files only"
    load_into(module, load_safetensors_checked(path, config.sha256), source=f"{field}: {path}")


def describe_missing_file(field: str, source: str) -> str:
    """Say that a file of weights is not there; `field` is where the weights stand."""
    return (
        f"{field}.source: {source!r}: no such file; expected a .safetensors file (a path or s3:// "
        "URI)"
    )


def is_missing(source: str) -> bool:
    """Whether a path is not there; objects in buckets are left to their readers."""
    return not is_remote(source) and not Path(source).exists()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fqgan_dist" / "weights"
