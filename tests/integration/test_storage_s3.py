"""The storage on a real S3 server: Ceph's RADOS gateway on loopback."""

from __future__ import annotations

import itertools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.datasets import build_photographs
from support.radosgw import S3_BUCKET

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

pytestmark = pytest.mark.usefixtures("s3_credentials")


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{S3_BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}")


def test_written_bytes_are_read_back(storage: Storage) -> None:
    storage.write_bytes("a/b", b"long first version")
    storage.write_bytes("a/b", b"hello")
    assert storage.read_bytes("a/b") == b"hello"
    assert storage.read_bytes("a/b", offset=1, length=2) == b"el"
    assert storage.read_bytes("a/b", offset=3) == b"lo"
    assert storage.read_bytes("a/b", offset=5) == b""
    assert storage.size("a/b") == 5
    storage.write_bytes("empty", b"")
    assert storage.read_bytes("empty") == b""


def test_objects_of_many_parts_are_read_back(storage: Storage) -> None:
    data = os.urandom(2**20) * 110  # a multipart upload begins at 100 MiB
    storage.write_bytes("large", data)
    assert storage.read_bytes("large") == data


def test_a_local_file_replaces_the_whole_object(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for data in (b"short", os.urandom(2**20) * 110):
        source.write_bytes(data)
        storage.write_file("a/x", source)
        assert storage.read_bytes("a/x") == data


def test_range_beyond_the_end_is_an_error(storage: Storage) -> None:
    storage.write_bytes("x", b"0123")
    for offset in (2, 9):
        with pytest.raises(DataError, match=f"has no 3 bytes at offset {offset}"):
            storage.read_bytes("x", offset=offset, length=3)
    with pytest.raises(DataError, match="has no 3 bytes at offset 2, only 2"):
        storage.read_ranges([("x", 0, 1), ("x", 2, 3)])


def test_ranges_are_read_in_the_order_asked_for(storage: Storage) -> None:
    storage.write_bytes("x", b"0123456789")
    storage.write_bytes("y", b"abc")
    ranges = [("y", 1, 2), ("x", 7, 3), ("x", 0, 1)] * 20
    assert storage.read_ranges(ranges) == [b"bc", b"789", b"0"] * 20


def test_missing_object_is_file_not_found(storage: Storage) -> None:
    storage.write_bytes("folder/x", b"")
    for path in ("none", "folder"):
        assert not storage.exists(path)
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.read_bytes(path)


def test_list_names_what_is_directly_below(storage: Storage) -> None:
    for path in ("b", "a/x", "a/y/z"):
        storage.write_bytes(path, b"")
    assert storage.list() == ["a", "b"]
    assert storage.list("a") == ["x", "y"]
    assert storage.list("nothing") == []
    assert storage.list("b") == []


def test_another_writers_object_is_seen_at_once(storage: Storage) -> None:
    other = Storage(storage.root)
    assert storage.list("commits") == []
    other.create_bytes("commits/1", b"1")
    assert storage.list("commits") == ["1"]
    assert storage.exists("commits/1")


def test_delete_of_a_missing_object_is_no_error(storage: Storage) -> None:
    storage.write_bytes("x", b"")
    storage.delete("x")
    storage.delete("x")
    assert not storage.exists("x")


@pytest.mark.parametrize("size", [5, 110 * 2**20])
def test_create_refuses_another_object_of_that_name(storage: Storage, size: int) -> None:
    # The large size is the trap: as a multipart upload Ceph 16 would overwrite.
    first, second = b"1" * size, b"2" * size
    storage.create_bytes("commit", first)
    storage.create_bytes("commit", first)  # the retry of a put whose answer was lost
    with pytest.raises(FileExistsError, match="exists already"):
        storage.create_bytes("commit", second)
    assert storage.read_bytes("commit") == first


def test_of_many_creators_exactly_one_wins(storage: Storage) -> None:
    def create(number: int) -> bool:
        try:
            Storage(storage.root).create_bytes("commits/1", str(number).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes("commits/1") == str(won.index(True)).encode()


def test_open_read_is_seekable(storage: Storage) -> None:
    storage.write_bytes("x", b"0123456789")
    with storage.open_read("x") as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == b"89"


def test_storage_connects_again_after_pickling(storage: Storage) -> None:
    storage.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def test_missing_bucket_is_named() -> None:
    storage = Storage("s3://no-such-bucket/run")
    for call in (
        lambda: storage.write_bytes("x", b""),
        lambda: storage.read_bytes("x"),
        lambda: storage.list(),
    ):
        with pytest.raises(DataError, match=r"no-such-bucket.*the bucket does not exist"):
            call()


def test_wrong_credentials_are_named_but_not_shown(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    for call in (lambda: storage.write_bytes("x", b""), lambda: storage.read_bytes("x")):
        with pytest.raises(DataError, match="access is refused") as caught:
            call()
        assert "wrong-secret" not in str(caught.value)


def test_absent_credentials_are_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match="Unable to locate credentials"):
        storage.read_bytes("x")


def test_dataset_in_a_bucket_is_the_dataset_on_a_disk(storage: Storage, tmp_path: Path) -> None:
    local = Storage(tmp_path)
    index = build_photographs(local, "data")
    assert build_photographs(storage, "data").dataset_id == index.dataset_id
    for entry in index.shards:
        assert list(iterate_shard(storage, "data", entry)) == list(
            iterate_shard(local, "data", entry)
        )
    loaders = [
        ImageLoader(
            root,
            "data",
            seed=1,
            view=ViewConfig(policy="random_crop_flip", image_size=16),
            num_views=None,
            micro_batch_size=4,
            micro_batches_per_step=2,
            window_shards=8,
            loader_workers=0,
            max_damaged_in_a_row=1,
        )
        for root in (local, storage)
    ]
    streams = [itertools.islice(loader.batches(0, [0, 1]), 3) for loader in loaders]
    for on_disk, in_bucket in zip(*streams, strict=True):
        for first, second in zip(on_disk, in_bucket, strict=True):
            assert first.keys == second.keys
            assert torch.equal(first.images, second.images)
