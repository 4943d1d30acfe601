from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.datasets import build_photographs

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import DatasetIndex, load_index, load_samples
from fqgan_dist.errors import DataError
from fqgan_dist.stages.images import chunk_range, count_chunks, read_rows, read_shard
from fqgan_dist.storage.storage import Storage

CENTER = ViewConfig(policy="center", image_size=16)
TEN = ViewConfig(policy="ten_crop", image_size=16)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("dataset"))
    build_photographs(storage.child("train"), crops=2, samples_per_shard=7)
    return storage


def test_chunks_cover_all_ids_once() -> None:
    for total, size in ((10, 3), (9, 3), (2, 5)):
        chunks = [chunk_range(chunk, size, total) for chunk in range(count_chunks(total, size))]
        assert [row for chunk in chunks for row in chunk] == list(range(total))


def open_train(storage: Storage, index: DatasetIndex) -> Dataset:
    return Dataset(storage.child("train"), index)


def test_rows_across_shards_are_those_of_the_shards_in_order(storage: Storage) -> None:
    index = load_index(storage.child("train"))
    dataset = open_train(storage, index)
    keys: list[str] = []
    images: list[torch.Tensor] = []
    for entry in index.shards:
        for batch in read_shard(dataset, entry, CENTER, (0,), seed=0, batch_size=3):
            keys += batch.keys
            images.append(batch.images)
    rows = range(4, 17)  # begins and ends inside shards
    found = read_rows(dataset, rows, CENTER)
    assert found.keys == keys[4:17]
    assert torch.equal(found.images, torch.cat(images)[4:17])


def test_views_of_a_sample_follow_each_other(storage: Storage) -> None:
    dataset = open_train(storage, load_index(storage.child("train")))
    entry = dataset.index.shards[0]
    batches = list(read_shard(dataset, entry, TEN, range(10), seed=0, batch_size=25))
    assert [len(batch.keys) for batch in batches] == [2, 2, 2]
    images = batches[0].images
    assert images.shape == (20, 3, 16, 16)
    assert [crop.flip for crop in batches[0].crops[0]] == [False] * 5 + [True] * 5
    # Crop 5 is the top left of the mirrored image: the mirror image of crop 1, the top right.
    assert torch.equal(images[5], images[1].flip(-1))


def test_read_shard_checks_the_hash(storage: Storage, tmp_path: Path) -> None:
    index = load_index(storage.child("train"))
    damaged = Storage(tmp_path)
    table = f"train/{index.shards[0].samples_file}"
    damaged.write_bytes(table, storage.read_bytes(table))
    data = bytearray(storage.read_bytes(f"train/{index.shards[0].file}"))
    data[-1] ^= 1  # in the padding after the last member: every image still decodes
    damaged.write_bytes(f"train/{index.shards[0].file}", bytes(data))
    dataset = open_train(damaged, index)
    with pytest.raises(DataError, match="damaged"):
        list(read_shard(dataset, index.shards[0], CENTER, (0,), seed=0, batch_size=8))


def test_rows_whose_bytes_are_not_those_of_the_table_are_refused(
    storage: Storage, tmp_path: Path
) -> None:
    index = load_index(storage.child("train"))
    damaged = Storage(tmp_path)
    for name in (index.shards[0].file, index.shards[0].samples_file):
        damaged.write_bytes(f"train/{name}", storage.read_bytes(f"train/{name}"))
    table = load_samples(storage.child("train"), index.shards[0])
    data = bytearray(damaged.read_bytes(f"train/{index.shards[0].file}"))
    data[int(table.offsets[2] + table.sizes[2] // 2)] ^= 1
    damaged.write_bytes(f"train/{index.shards[0].file}", bytes(data))
    dataset = open_train(damaged, index)
    assert len(read_rows(dataset, range(2), CENTER).keys) == 2
    with pytest.raises(DataError, match=f"{table.keys[2]}.*damaged"):
        read_rows(dataset, range(3), CENTER)
