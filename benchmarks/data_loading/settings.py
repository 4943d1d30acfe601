"""Options of `benchmarks/data.py`; the defaults are those of the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from benchmarks.paired import DEFAULT_ROUNDS
from fqgan_dist.config import Config

SubjectName = Literal["decode", "loaders", "bandwidth", "codes", "scale"]


class Settings(Config):
    """What is measured, and with how much work."""

    subject: list[SubjectName] = Field(
        default=["decode", "loaders", "bandwidth", "codes", "scale"], min_length=1
    )
    """Parts of the benchmark, in this order."""
    images: Path | None = None
    """Folder of JPEGs, or of tar files (.tar, .tar.gz) of them, or one such tar file; required for
    decode, loaders and bandwidth."""
    work: Path | None = None
    """Folder for what is written while measuring, up to 2 GB, and removed at the end; None: one in
    TMPDIR."""
    results: Path | None = None
    """Folder where table and JSON are kept; None: they are only printed."""
    rounds: int = Field(default=DEFAULT_ROUNDS, ge=1)
    """Rounds of the paired comparisons."""
    repeats: int = Field(default=3, ge=1)
    """Repetitions of measurements against an absolute limit."""
    image_size: int = Field(default=256, ge=16)
    """Side of the crops in pixels."""
    max_images: int | None = Field(default=None, ge=1)
    """Use only so many images; None: all."""
    qualities: list[int] = Field(default=[95, 90], min_length=1)
    """decode: JPEG qualities of the shards of reduced images."""
    workers: list[int] = Field(default=[0, 2], min_length=1)
    """loaders: numbers of loader workers, measured one after the other."""
    batch_size: int = Field(default=32, ge=1)
    """loaders, bandwidth: images per batch."""
    batches_per_round: int = Field(default=5, ge=1)
    """loaders: batches of one loader in one round."""
    shard_mib: int = Field(default=128, ge=1)
    """bandwidth: size of the object that is downloaded."""
    connection_mb_per_s: float = Field(default=1.0, gt=0)
    """bandwidth: throttle of each connection, 10^6 bytes/s. A cloud's 90 MB/s would measure the
    proxy, which is Python on the same cores."""
    first_byte_ms: float = Field(default=60.0, ge=0)
    """bandwidth: delay of every answer."""
    code_images: int = Field(default=4000, ge=1)
    """codes: images with ten views of codes each."""
    shards: int = Field(default=10_000, ge=1)
    """scale: shards of the index."""
    samples_per_shard: int = Field(default=1200, ge=1)
    """scale: samples of each shard."""
