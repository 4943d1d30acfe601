"""Datasets of many tiny images of one colour each, written in milliseconds, and damage to them."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from PIL import Image
from support.synthetic_shards import flip_byte, pack, publish_shard, tabulate

from fqgan_dist.data.index import DatasetIndex, load_samples, write_index
from fqgan_dist.storage.storage import Storage

SIDE = 4
NOT_AN_IMAGE = b"not an image"


def key_of(number: int) -> str:
    """Name the sample of a number, counted through all shards."""
    return f"sample{number:05d}"


def colour_of(key: str) -> tuple[int, int, int]:
    """Give the colour of all pixels of a sample, another one for each of them."""
    number = int(key.removeprefix("sample"))
    return (number % 256, number // 256, 77)


def write_tiny_dataset(
    storage: Storage,
    counts: Sequence[int],
    *,
    undecodable: Collection[str] = (),
    contents: bytes = NOT_AN_IMAGE,
    split: str = "train",
) -> DatasetIndex:
    """Write a dataset with so many samples in each shard at a storage's root.

    Args:
        storage: where it goes.
        counts: samples in each shard.
        undecodable: keys of samples that were no images when the dataset was made.
        contents: what is in their files.
        split: what the index calls it.
    """
    shards, first = [], 0
    for number, count in enumerate(counts):
        keys = [key_of(each) for each in range(first, first + count)]
        tar = pack(
            (f"{key}.png", contents if key in undecodable else _encode(colour_of(key)))
            for key in keys
        )
        table = tabulate(tar, {f"{key}.png": int(key[-1]) for key in keys})
        shards.append(publish_shard(storage, tar, table, file=f"shard-{number:06d}.tar"))
        first += count
    index = DatasetIndex(
        name="tiny",
        split=split,
        classes=[f"class{label}" for label in range(10)],
        image_policy={"kind": "original"},
        shards=shards,
    )
    write_index(storage, index)
    return index


def damage_samples(storage: Storage, index: DatasetIndex, keys: Collection[str]) -> None:
    """Change one bit in the middle of the stored images of samples."""
    for entry in index.shards:
        table = load_samples(storage, entry)
        for key, offset, size in zip(table.keys, table.offsets, table.sizes, strict=True):
            if key in keys:
                flip_byte(storage, entry.file, int(offset) + int(size) // 2)


def _encode(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), colour).save(buffer, "PNG")
    return buffer.getvalue()
