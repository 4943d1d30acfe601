"""Datasets of any size without images of their own: tables of samples and an index."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fqgan_dist.data.index import (
    DatasetIndex,
    SampleTable,
    ShardEntry,
    encode_samples,
    image_digest,
    stack_digests,
    table_name,
    write_index,
)
from fqgan_dist.storage.storage import Storage

NUM_CLASSES = 1000
_IMAGE_SIDE = 32


def publish(folder: Path, entries: Sequence[ShardEntry]) -> DatasetIndex:
    """Write the index of shards."""
    index = DatasetIndex(
        name="synthetic",
        split="train",
        classes=[f"class{number:04d}" for number in range(NUM_CLASSES)],
        image_policy={"kind": "original"},
        shards=list(entries),
    )
    write_index(Storage(folder), index)
    return index


def write_table(folder: Path, shard_file: str, table: SampleTable, tar: bytes) -> ShardEntry:
    """Write a shard's table of samples, not its tar, and give its entry of the index."""
    data = encode_samples(table, {})
    (folder / table_name(shard_file)).write_bytes(data)
    return ShardEntry(
        file=shard_file,
        count=len(table),
        bytes=int((table.offsets + table.sizes).max()) if not tar else len(tar),
        sha256=hashlib.sha256(tar or shard_file.encode()).hexdigest(),
        samples_sha256=hashlib.sha256(data).hexdigest(),
    )


def make_table(keys: Sequence[str], offsets: np.ndarray, image: bytes) -> SampleTable:
    """Make the table of a shard all of whose samples are one image."""
    count = len(keys)
    return SampleTable(
        keys=list(keys),
        labels=(np.arange(count) % NUM_CLASSES).astype(np.int32),
        offsets=offsets.astype(np.int64),
        sizes=np.full(count, len(image), np.int64),
        widths=np.full(count, _IMAGE_SIDE, np.int32),
        heights=np.full(count, _IMAGE_SIDE, np.int32),
        digests=stack_digests([image_digest(image)] * count),
    )


def write_linked_shards(folder: Path, num_shards: int, samples_per_shard: int) -> DatasetIndex:
    """Write a dataset all of whose shards are one small shard, under as many names.

    Index, tables and tars are real: whatever a loader does with such a dataset, it does as with one
    of different shards. Only the page cache holds less.
    """
    folder.mkdir()
    image = make_image()
    keys = [f"sample{number:06d}" for number in range(samples_per_shard)]
    tar, offsets = _pack(keys, image)
    first = "shard-000000.tar"
    entry = write_table(folder, first, make_table(keys, offsets, image), tar)
    (folder / first).write_bytes(tar)
    entries = [entry]
    for number in range(1, num_shards):
        name = f"shard-{number:06d}.tar"
        # Symbolic links: file systems limit the number of a file's names.
        (folder / name).symlink_to(first)
        (folder / table_name(name)).symlink_to(table_name(first))
        entries.append(entry.model_copy(update={"file": name}))
    return publish(folder, entries)


def make_image() -> bytes:
    """Make a small JPEG."""
    pixels = np.random.default_rng(0).integers(
        256, size=(_IMAGE_SIDE, _IMAGE_SIDE, 3), dtype=np.uint8
    )
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="JPEG")
    return sink.getvalue()


def _pack(keys: Sequence[str], image: bytes) -> tuple[bytes, np.ndarray]:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for key in keys:
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
    blocks = 1 + -(-len(image) // tarfile.BLOCKSIZE)
    offsets = tarfile.BLOCKSIZE * (1 + blocks * np.arange(len(keys)))
    return sink.getvalue(), offsets
