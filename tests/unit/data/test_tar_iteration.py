from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.datasets import build_photographs

from fqgan_dist.data.index import ShardEntry, load_samples
from fqgan_dist.data.storage import Storage
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.errors import DataError


def pack(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def publish(storage: Storage, data: bytes, count: int) -> ShardEntry:
    storage.write_bytes("data/shard-000000.tar", data)
    return ShardEntry(
        file="shard-000000.tar",
        count=count,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        samples_sha256="0" * 64,
    )


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def test_samples_come_in_the_order_of_the_table(storage: Storage) -> None:
    index = build_photographs(storage, "data")
    assert len(index.shards) > 1
    for entry in index.shards:
        table = load_samples(storage, "data", entry)
        samples = list(iterate_shard(storage, "data", entry))
        assert [key for key, _, _ in samples] == table.keys
        assert np.array_equal([label for _, label, _ in samples], table.labels)
        for (_, _, data), offset, size in zip(samples, table.offsets, table.sizes, strict=True):
            path = f"data/{entry.file}"
            assert data == storage.read_bytes(path, offset=int(offset), length=int(size))


def test_dataset_may_be_the_root(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.cls", b"3")]), 1)
    assert list(iterate_shard(storage.child("data"), "", entry)) == [("a", 3, b"x")]


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("/nonexistent/unpickled",))  # type: ignore[return-value]


def test_members_outside_the_whitelist_are_never_decoded(storage: Storage) -> None:
    # webdataset's own decoder would unpickle these two.
    trap = pickle.dumps(Trap())
    members = [("a.png", b"x"), ("a.cls", b"3"), ("a.pyd", trap), ("a.pickle", trap)]
    entry = publish(storage, pack(members), 1)
    assert list(iterate_shard(storage, "data", entry)) == [("a", 3, b"x")]


@pytest.mark.parametrize(
    "members",
    [
        [("a.png", b"x")],
        [("a.cls", b"3")],
        [("a.png", b"x"), ("a.cls", b"three")],
        [("a.png", b"x"), ("a.cls", b"-1")],
        [("a.png", b"x"), ("a.jpg", b"y"), ("a.cls", b"3")],
    ],
)
def test_sample_without_one_image_and_a_label_is_a_data_error(
    storage: Storage, members: list[tuple[str, bytes]]
) -> None:
    entry = publish(storage, pack(members), 1)
    with pytest.raises(DataError, match=r"shard-000000.tar: sample 'a': .* expected one image"):
        list(iterate_shard(storage, "data", entry))


def test_repeated_member_is_a_data_error(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.png", b"y"), ("a.cls", b"3")]), 1)
    with pytest.raises(DataError, match="duplicate file name"):
        list(iterate_shard(storage, "data", entry))


def test_flipped_bit_is_found_at_the_end(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.cls", b"3")]), 1)
    data = storage.read_bytes("data/shard-000000.tar")
    storage.write_bytes("data/shard-000000.tar", data.replace(b"x", b"y", 1))
    with pytest.raises(DataError, match=r"damaged: its sha256 is .* copy it again"):
        list(iterate_shard(storage, "data", entry))


def test_flipped_bit_in_the_padding_is_found(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.cls", b"3")]), 1)
    data = storage.read_bytes("data/shard-000000.tar")
    storage.write_bytes("data/shard-000000.tar", data[:-1] + b"\1")
    with pytest.raises(DataError, match="damaged"):
        list(iterate_shard(storage, "data", entry))


def test_wrong_number_of_samples_is_found(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.cls", b"3")]), 2)
    with pytest.raises(DataError, match="1 samples, the index has 2"):
        list(iterate_shard(storage, "data", entry))


def test_cut_shard_is_found_before_reading(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.cls", b"3")]), 1)
    data = storage.read_bytes("data/shard-000000.tar")
    storage.write_bytes("data/shard-000000.tar", data[:600])
    with pytest.raises(DataError, match=f"600 bytes, the index has {entry.bytes}"):
        next(iterate_shard(storage, "data", entry))


def test_compressed_shard_is_refused(storage: Storage) -> None:
    # webdataset would expand it, however large it becomes.
    entry = publish(storage, gzip.compress(pack([("a.png", bytes(10**6)), ("a.cls", b"3")])), 1)
    with pytest.raises(DataError, match="not a plain tar archive"):
        next(iterate_shard(storage, "data", entry))


def test_missing_shard_is_a_data_error(storage: Storage) -> None:
    entry = publish(storage, pack([("a.png", b"x"), ("a.cls", b"3")]), 1)
    storage.delete("data/shard-000000.tar")
    with pytest.raises(DataError, match="no such file; the dataset is not complete"):
        next(iterate_shard(storage, "data", entry))
