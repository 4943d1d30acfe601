from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from support.datasets import build_photographs
from support.synthetic_shards import (
    Member,
    flip_byte,
    pack,
    publish_shard,
    tabulate,
)
from webdataset.tariterators import group_by_keys, tar_file_expander

from fqgan_dist.data.index import ShardEntry, load_samples
from fqgan_dist.data.tar_iteration import iterate_images, iterate_shard
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

FILE = "shard-000000.tar"
PATH = f"data/{FILE}"
TWO = (("a.jpg", b"first"), ("a.cls", b"3"), ("b.jpg", b"second"), ("b.cls", b"4"))


def publish(
    storage: Storage, members: Sequence[Member] = TWO, labels: dict[str, int] | None = None
) -> ShardEntry:
    tar = pack(members)
    table = tabulate(tar, labels or {"a.jpg": 3, "b.jpg": 4})
    return publish_shard(storage.child("data"), tar, table, file=FILE)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def test_samples_come_in_the_order_of_the_table(storage: Storage) -> None:
    index = build_photographs(storage.child("data"))
    assert len(index.shards) > 1
    for entry in index.shards:
        table = load_samples(storage.child("data"), entry)
        samples = list(iterate_shard(storage.child("data"), entry))
        assert [key for key, _, _ in samples] == table.keys
        assert np.array_equal([label for _, label, _ in samples], table.labels)
        for (_, _, data), offset, size in zip(samples, table.offsets, table.sizes, strict=True):
            path = f"data/{entry.file}"
            assert data == storage.read_bytes(path, offset=int(offset), length=int(size))


def test_samples_are_those_that_webdataset_reads(storage: Storage) -> None:
    entry = build_photographs(storage.child("data")).shards[0]
    with storage.open_read(f"data/{entry.file}") as stream:
        files = tar_file_expander([{"url": "shard", "stream": stream}])
        theirs = [
            (sample["__key__"], int(sample["cls"]), sample["png"])
            for sample in group_by_keys(files)
        ]
    assert list(iterate_shard(storage.child("data"), entry)) == theirs


def test_dataset_may_be_the_root(storage: Storage) -> None:
    entry = publish(storage)
    samples = [("a", 3, b"first"), ("b", 4, b"second")]
    assert list(iterate_shard(storage.child("data"), entry)) == samples


def test_members_that_the_table_does_not_hold_are_passed_over(storage: Storage) -> None:
    # A foreign shard: a broken image that its index left out, two images of one key, no labels.
    members = [
        ("broken.jpg", b"no image"),
        ("a.left.jpg", b"x" * 1000),
        ("a.jpg", b"first"),
        ("sub/b.JPEG", b"second"),
        ("sub/b.json", b"{}"),
    ]
    entry = publish(storage, members, {"a.jpg": 7, "sub/b.JPEG": 0})
    assert list(iterate_shard(storage.child("data"), entry)) == [
        ("a", 7, b"first"),
        ("sub/b", 0, b"second"),
    ]


def test_label_is_that_of_the_table(storage: Storage) -> None:
    entry = publish(storage, [("a.jpg", b"x"), ("a.cls", b"3")], {"a.jpg": 5})
    assert list(iterate_shard(storage.child("data"), entry)) == [("a", 5, b"x")]


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("/nonexistent/unpickled",))  # type: ignore[return-value]


def test_dangerous_members_are_never_touched(storage: Storage) -> None:
    # webdataset's own decoder would unpickle the first two.
    trap = pickle.dumps(Trap())
    members = [("a.jpg", b"x"), ("a.pyd", trap), ("a.pickle", trap), ("../../escaped.jpg", b"y")]
    entry = publish(storage, members, {"a.jpg": 0})
    assert list(iterate_shard(storage.child("data"), entry)) == [("a", 0, b"x")]
    assert not list(Path(storage.root).rglob("escaped*"))


def test_flipped_bit_in_an_image_is_found_before_it_is_given_out(storage: Storage) -> None:
    entry = publish(storage)
    flip_byte(storage, PATH, storage.read_bytes(PATH).index(b"second"))
    samples = iterate_shard(storage.child("data"), entry)
    assert next(samples) == ("a", 3, b"first")
    with pytest.raises(DataError, match=rf"{FILE}: sample 'b': damaged"):
        next(samples)


def test_a_damaged_image_is_told_in_its_place_and_reading_goes_on(storage: Storage) -> None:
    entry = publish(storage, [*TWO, ("c.jpg", b"third")], {"a.jpg": 3, "b.jpg": 4, "c.jpg": 5})
    flip_byte(storage, PATH, storage.read_bytes(PATH).index(b"second"))
    folder = storage.child("data")
    for is_strict in (True, False):
        first, second, third = iterate_images(
            folder, entry, load_samples(folder, entry), is_strict=is_strict
        )
        assert (first, third) == (b"first", b"third")
        assert isinstance(second, DataError)
        assert f"{FILE}: sample 'b': damaged" in str(second)


@pytest.mark.parametrize("offset", [0, 512 + 512 + 512, -1])
def test_flipped_bit_outside_the_images_is_found_at_the_end(storage: Storage, offset: int) -> None:
    entry = publish(storage)
    flip_byte(storage, PATH, offset)
    with pytest.raises(DataError, match=r"damaged: its sha256 is .* copy it again"):
        list(iterate_shard(storage.child("data"), entry))


def test_table_of_another_shard_is_refused(storage: Storage) -> None:
    entry = publish(storage)
    storage.write_bytes("data/shard-000000.samples.parquet", b"other")
    with pytest.raises(DataError, match=r"samples.parquet: damaged"):
        next(iterate_shard(storage.child("data"), entry))


def test_table_in_another_order_is_refused(storage: Storage) -> None:
    tar = pack(TWO)
    table = tabulate(tar, {"a.jpg": 3, "b.jpg": 4})
    backwards = replace(table, offsets=table.offsets[::-1], digests=table.digests[::-1])
    entry = publish_shard(storage.child("data"), tar, backwards, file=FILE)
    with pytest.raises(DataError, match="not in the order of the tar, or samples overlap"):
        next(iterate_shard(storage.child("data"), entry))


def test_cut_shard_is_found_before_reading(storage: Storage) -> None:
    entry = publish(storage)
    storage.write_bytes(PATH, storage.read_bytes(PATH)[:600])
    with pytest.raises(DataError, match=f"600 bytes, the index has {entry.bytes}"):
        next(iterate_shard(storage.child("data"), entry))


def test_compressed_shard_is_refused(storage: Storage) -> None:
    plain = pack([("a.jpg", bytes(10**6))])
    entry = publish_shard(
        storage.child("data"),
        gzip.compress(plain),
        tabulate(pack([("a.jpg", b"x")]), {"a.jpg": 0}),
        file=FILE,
    )
    with pytest.raises(DataError, match="not a plain tar archive"):
        next(iterate_shard(storage.child("data"), entry))


def test_compressed_shard_that_looks_plain_is_not_expanded(storage: Storage) -> None:
    # A gzip header with an extra field that puts a tar's magic where a plain tar has it: a reader
    # that looks for compression (tarfile's "r|*") would expand it, however large it becomes.
    extra = bytes(257 - 12) + b"ustar"
    head = b"\x1f\x8b\x08\x04" + bytes(6) + len(extra).to_bytes(2, "little") + extra
    bomb = head + gzip.compress(pack([("a.jpg", bytes(10**6))]))[10:]
    table = tabulate(pack([("a.jpg", b"x" * 9)]), {"a.jpg": 0})
    entry = publish_shard(storage.child("data"), bomb, table, file=FILE)
    with pytest.raises(DataError, match=r"sample 'a': damaged"):
        next(iterate_shard(storage.child("data"), entry))


@pytest.mark.parametrize("path", [PATH, "data/shard-000000.samples.parquet"])
def test_missing_file_is_a_data_error(storage: Storage, path: str) -> None:
    entry = publish(storage)
    storage.delete(path)
    with pytest.raises(DataError, match="no such file; the dataset is not complete"):
        next(iterate_shard(storage.child("data"), entry))


class _CutStorage(Storage):
    """A store whose shard is replaced by a shorter one after its size was asked."""

    def open_read(self, path: str) -> BinaryIO:
        return io.BytesIO(self.read_bytes(path, length=1300))


def test_shard_that_ends_while_it_is_read_is_a_data_error(storage: Storage) -> None:
    entry = publish(storage, [("a.jpg", bytes(1000))], {"a.jpg": 0})
    with pytest.raises(DataError, match=r"ends at byte 1300, before its last sample"):
        next(iterate_shard(_CutStorage(storage.uri("data")), entry))
