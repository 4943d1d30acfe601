from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from support.datasets import build_photographs
from support.synthetic_shards import flip_byte
from support.tiny_shards import damage_samples, key_of, write_tiny_dataset

from fqgan_dist.data.config import DataConfig, ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.index import SampleTable, load_index, load_samples
from fqgan_dist.errors import DataError
from fqgan_dist.stages.images import CroppedImages, ImageReader, chunk_range, count_chunks
from fqgan_dist.storage.storage import Storage

Change = Callable[[SampleTable], int]

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


def open_train(
    storage: Storage, view: ViewConfig = CENTER, views: Sequence[int] = (0,), **changes: object
) -> ImageReader:
    folder = storage.child("train")
    settings = {"source": "images", "views": {"policy": "center", "image_size": 16}, **changes}
    return ImageReader(Dataset.open(folder), DataConfig.model_validate(settings), view, views)


def copy_damaged(storage: Storage, target: Path, shard: int, change: Change) -> Storage:
    """Copy the dataset, with one byte of a shard changed where `change` says."""
    copy = Storage(target)
    for name, _ in storage.walk("train"):
        copy.write_bytes(f"train/{name}", storage.read_bytes(f"train/{name}"))
    entry = load_index(copy.child("train")).shards[shard]
    offset = change(load_samples(copy.child("train"), entry))
    flip_byte(copy, f"train/{entry.file}", offset)
    return copy


def in_row_2(table: SampleTable) -> int:
    return int(table.offsets[2] + table.sizes[2] // 2)


def behind_the_last(table: SampleTable) -> int:
    return -1


def read_all(reader: ImageReader, *, batch_size: int) -> list[CroppedImages]:
    shards = range(len(reader.dataset.index.shards))
    return [batch for shard in shards for batch in reader.read_shard(shard, batch_size=batch_size)]


def test_rows_across_shards_are_those_of_the_shards_in_order(storage: Storage) -> None:
    reader = open_train(storage)
    batches = read_all(reader, batch_size=3)
    keys = [key for batch in batches for key in batch.keys]
    images = torch.cat([batch.images for batch in batches])
    found = reader.read_rows(range(4, 17))  # begins and ends inside shards
    assert found.keys == keys[4:17]
    assert torch.equal(found.images, images[4:17])
    assert found.is_sound.tolist() == [True] * 13


def test_views_of_a_sample_follow_each_other(storage: Storage) -> None:
    batches = list(open_train(storage, TEN, range(10)).read_shard(0, batch_size=25))
    assert [len(batch.keys) for batch in batches] == [2, 2, 2]
    images = batches[0].images
    assert images.shape == (20, 3, 16, 16)
    assert [crop.flip for crop in batches[0].crops[0]] == [False] * 5 + [True] * 5
    # Crop 5 is the top left of the mirrored image: the mirror image of crop 1, the top right.
    assert torch.equal(images[5], images[1].flip(-1))


def test_a_shard_that_differs_where_no_image_is_counts_as_damaged_only_with_fail(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = copy_damaged(storage, tmp_path, 0, behind_the_last)
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged: its sha256"):
        list(open_train(damaged, on_damage="fail").read_shard(0, batch_size=8))
    with caplog.at_level(logging.WARNING):
        (batch,) = open_train(damaged).read_shard(0, batch_size=8)
    assert not batch.damage
    assert "shard-000000.tar: damaged: its sha256 is" in caplog.text
    assert "but all its images are right" in caplog.text


@pytest.mark.parametrize("by", ["shard", "rows"])
def test_a_damaged_sample_is_black_and_the_others_are_as_ever(
    by: str, storage: Storage, tmp_path: Path
) -> None:
    def read(reader: ImageReader) -> list[CroppedImages]:
        if by == "shard":
            return list(reader.read_shard(0, batch_size=30))
        return [reader.read_rows(range(3)), reader.read_rows(range(3, 6))]

    damaged = copy_damaged(storage, tmp_path, 0, in_row_2)
    views = range(10) if by == "shard" else (0,)
    whole = read(open_train(storage, TEN, views))
    found = read(open_train(damaged, TEN, views))
    assert [list(batch.damage) for batch in found] == [[2], [], []][: len(found)]
    first, expected = found[0], whole[0]
    assert first.is_sound.tolist() == [True, True, False]
    assert first.damage[2].key == expected.keys[2]
    assert "are not those of the table of samples, also when read again" in first.damage[2].reason
    start = 2 * len(views)
    assert torch.equal(first.images[:start], expected.images[:start])
    assert not first.images[start:].any()
    assert first.crops[:2] == expected.crops[:2]
    assert {crop.resized_height for crop in first.crops[2]} == {0}
    assert (first.keys, first.labels.tolist()) == (expected.keys, expected.labels.tolist())
    for ours, theirs in zip(found[1:], whole[1:], strict=True):
        assert torch.equal(ours.images, theirs.images)
    strict = open_train(damaged, TEN, views, on_damage="fail")
    with pytest.raises(DataError, match=f"shard-000000.tar: sample '{first.keys[2]}': damaged"):
        read(strict)


class ChangedOnTheWay(Storage):
    """Gives streams whose bytes are not those that are stored."""

    def open_read(self, path: str) -> BinaryIO:
        data = bytearray(self.read_bytes(path))
        data[self.offset] ^= 1
        return io.BytesIO(data)

    offset = 0


@pytest.mark.parametrize("on_damage", ["replace", "fail"])
def test_a_sample_that_came_damaged_in_a_stream_is_read_once_more(
    on_damage: str, storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ChangedOnTheWay(storage.uri("train"))
    reader = open_train(storage, on_damage=on_damage)
    folder.offset = in_row_2(load_samples(folder, reader.dataset.index.shards[0]))
    reader.dataset = Dataset(folder, reader.dataset.index)
    with caplog.at_level(logging.WARNING):
        (batch,) = reader.read_shard(0, batch_size=8)
    (expected,) = open_train(storage).read_shard(0, batch_size=8)
    assert not batch.damage
    assert torch.equal(batch.images, expected.images)
    assert not caplog.records


def test_a_shard_of_nothing_but_damage_is_left_out_where_others_could_stand_in(
    tmp_path: Path,
) -> None:
    storage = Storage(tmp_path)
    index = write_tiny_dataset(storage.child("train"), (8, 40))
    damage_samples(storage.child("train"), index, [key_of(number) for number in range(8)])
    (batch,) = open_train(storage).read_shard(0, batch_size=8)
    assert list(batch.damage) == list(range(8))
    assert not open_train(storage).read_rows(range(8, 48)).damage


def test_too_many_damaged_in_a_row_are_an_error_that_names_them(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_tiny_dataset(storage.child("train"), (3, 3), undecodable=list(map(key_of, range(6))))
    with pytest.raises(DataError, match=r"3 damaged sample.*max_damaged_in_a_row is 3") as caught:
        list(open_train(storage, max_damaged_in_a_row=3).read_shard(0, batch_size=2))
    assert str(caught.value).count(": sample 'sample") == 3
    with pytest.raises(DataError, match=r"6 damaged sample.*has no further sample; check"):
        open_train(storage, max_damaged_in_a_row=9).read_rows(range(4))
