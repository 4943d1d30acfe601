"""Small datasets of arbitrary bytes: shards, tables and index without any image to decode."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fqgan_dist.data.index import (
    DatasetIndex,
    SampleTable,
    ShardEntry,
    encode_samples,
    image_digest,
    table_name,
    write_index,
)
from fqgan_dist.storage.storage import Storage

Member = tuple[str, bytes]


def random_bytes(size: int, *seeds: int) -> bytes:
    """Give bytes that depend on the seeds and compress badly, as an image's do."""
    return np.random.default_rng(seeds).bytes(size)


def pack(members: Iterable[Member]) -> bytes:
    """Write a plain tar of members, by name and bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tabulate(tar: bytes, labels: Mapping[str, int]) -> SampleTable:
    """Make the table of the members that `labels` names, in the order of the tar."""
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        members = [member for member in archive if member.name in labels]
    images = [tar[member.offset_data : member.offset_data + member.size] for member in members]
    digests = b"".join(map(image_digest, images))
    return SampleTable(
        keys=[member.name.rpartition(".")[0] for member in members],
        labels=np.array([labels[member.name] for member in members], np.int32),
        offsets=np.array([member.offset_data for member in members], np.int64),
        sizes=np.array([member.size for member in members], np.int64),
        widths=np.ones(len(members), np.int32),
        heights=np.ones(len(members), np.int32),
        digests=np.frombuffer(digests, np.uint8).reshape(len(members), -1),
    )


def publish_shard(folder: Storage, tar: bytes, table: SampleTable, *, file: str) -> ShardEntry:
    """Write a tar and its table."""
    encoded = encode_samples(table, {})
    folder.write_bytes(file, tar)
    folder.write_bytes(table_name(file), encoded)
    return ShardEntry(
        file=file,
        count=len(table),
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        samples_sha256=hashlib.sha256(encoded).hexdigest(),
    )


def publish_dataset(
    folder: Storage, counts: Sequence[int], *, image_bytes: int = 700, seed: int = 0
) -> DatasetIndex:
    """Write shards of `counts` samples of random bytes, one class per shard, and their index."""
    shards: list[ShardEntry] = []
    for shard, count in enumerate(counts):
        names = [f"s{seed}-{shard}-{row}" for row in range(count)]
        members: list[Member] = []
        for row, name in enumerate(names):
            members.append((f"{name}.cls", str(shard).encode()))
            members.append((f"{name}.jpg", random_bytes(image_bytes, seed, shard, row)))
        tar = pack(members)
        table = tabulate(tar, {f"{name}.jpg": shard for name in names})
        file = f"shard-{shard:06d}.tar"
        shards.append(publish_shard(folder, tar, table, file=file))
    index = DatasetIndex(
        name="synthetic",
        split="train",
        classes=[f"class-{shard}" for shard in range(len(counts))],
        image_policy={"seed": seed},
        shards=shards,
    )
    write_index(folder, index)
    return index


def flip_byte(storage: Storage, path: str, offset: int) -> None:
    """Change one byte of a stored object."""
    data = bytearray(storage.read_bytes(path))
    data[offset] ^= 1
    storage.write_bytes(path, bytes(data))
