"""`fqgan-data verify`: find every damaged file, and with `deep=true` every damaged image."""

from __future__ import annotations

from pydantic import Field

from data_tools.workers import count_workers
from fqgan_dist.config import Config
from fqgan_dist.sharding.verification import VerifyReport, verify_dataset
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer


class VerifyOptions(Config):
    """Options of `fqgan-data verify`."""

    deep: bool = False
    """Also decode every image, compare every label, place, size and hash with the tables, and count
    images with equal bytes; else sizes and hashes of all files are checked."""
    workers: int | None = Field(default=None, ge=1)
    """Threads that hash shards, or processes where it is deep; none: one per core."""


def verify(uri: str, options: VerifyOptions, *, observer: Observer) -> VerifyReport:
    """Check a dataset against its index.

    Raises:
        DataError: there is no dataset, or the storage cannot be read.
    """
    return verify_dataset(
        Storage(uri),
        is_deep=options.deep,
        workers=count_workers(options.workers),
        observer=observer,
    )
