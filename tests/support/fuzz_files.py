"""What the makers of files for fuzzing share: files of a folder, hashes, a few tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from support.byte_mutations import (
    json_mutator,
)

from fqgan_dist.sharding.plan import ShardingConfig
from fqgan_dist.storage.storage import Storage

FINGERPRINT = "0123456789abcdef"
JSON = json_mutator()
"""Mutates any document of JSON."""


def collect_files(folder: str | Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    root = Path(folder)
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def spread_files(folder: Path, files: dict[str, bytes]) -> Storage:
    """Write files below a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Storage(folder)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_tensors() -> dict[str, torch.Tensor]:
    return {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.zeros(2),
        "1.weight": torch.ones(1, 2, dtype=torch.float16),
        "1.bias": torch.tensor([3]),
    }


def make_tensor_file() -> list[bytes]:
    return [safetensors.torch.save(make_tensors(), {"fingerprint": FINGERPRINT})]


def sharding_config() -> ShardingConfig:
    return ShardingConfig(name="x", split="train", samples_per_shard=2)
