"""Hash and write the files of a checkpoint, from wherever their bytes lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_format import BlockHashes, hash_blocks

TRANSFER_THREADS = 4
"""Transfers at once; one S3 connection carries about 90 MB/s (performance.md section 8)."""
# What a reader fetches at least, and verifies at once: two of its blocks at most are not wholly its
# own for each run of what it needs, and 1 GB of a manifest's files has 256 hashes (17 kB).
_BLOCK_BYTES = 4 * 2**20


def write_files(
    storage: Storage, folder: str, files: Mapping[str, memoryview]
) -> dict[str, BlockHashes]:
    """Write files side by side, each below its name; the first error ends it."""

    def write(name: str) -> BlockHashes:
        blocks = hash_blocks(files[name], _BLOCK_BYTES)
        storage.write_bytes(f"{folder}/{name}", files[name])
        return blocks

    with ThreadPoolExecutor(TRANSFER_THREADS, "checkpoint-transfer") as executor:
        return dict(zip(files, executor.map(write, files), strict=True))
