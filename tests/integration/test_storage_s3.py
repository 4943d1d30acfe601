"""The storage on a real S3 server: Ceph's RADOS gateway on loopback."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from support.datasets import build_photographs
from support.radosgw import S3_BUCKET
from support.storage_contract import StorageContract, Store

from fqgan_dist.data.config import ViewConfig
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.loader import ImageLoader
from fqgan_dist.data.tar_iteration import iterate_shard
from fqgan_dist.errors import DataError
from fqgan_dist.storage import s3_uploads
from fqgan_dist.storage.leftovers import Swept
from fqgan_dist.storage.storage import Storage

pytestmark = pytest.mark.usefixtures("s3_credentials")


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{S3_BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}")


@pytest.fixture
def gateway_store(monkeypatch: pytest.MonkeyPatch) -> Store:
    def refuse() -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")

    return Store(f"s3://{S3_BUCKET}/{uuid.uuid4().hex}", refuse)


class TestGateway(StorageContract):
    store_fixture = "gateway_store"


def test_objects_of_many_parts_are_read_back(storage: Storage) -> None:
    data = os.urandom(2**20) * 110  # a multipart upload begins at 100 MiB
    storage.write_bytes("large", data)
    assert storage.read_bytes("large") == data


KILLED_UPLOAD = """
import os, sys
from fqgan_dist.storage import s3_uploads
from fqgan_dist.storage.storage import Storage

async def die(*_):
    os._exit(9)

s3_uploads._complete = die
Storage(sys.argv[1]).write_bytes("folder/large", bytes(33 * 2**20))
"""


def test_the_parts_of_a_killed_upload_are_removed_after_a_day(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("small", b"1")
    done = subprocess.run([sys.executable, "-c", KILLED_UPLOAD, storage.root], check=False)
    assert done.returncode == 9
    assert storage.list() == ["small"]
    assert storage.sweep() == Swept()
    monkeypatch.setattr(s3_uploads, "FOREIGN_S", -60.0)  # clocks of answers are whole seconds
    assert Storage(f"{storage.root}-other").sweep() == Swept()
    assert storage.sweep("folder") == Swept(1, 33 * 2**20)
    assert storage.sweep() == Swept()
    assert storage.list() == ["small"]


def test_a_local_file_replaces_the_whole_object(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for data in (b"short", os.urandom(2**20) * 110):
        source.write_bytes(data)
        storage.write_file("a/x", source)
        assert storage.read_bytes("a/x") == data


@pytest.mark.parametrize("size", [5, 110 * 2**20])
def test_create_refuses_another_object_of_that_name(storage: Storage, size: int) -> None:
    # The large size is the trap: as a multipart upload Ceph 16 would overwrite.
    first, second = b"1" * size, b"2" * size
    storage.create_bytes("commit", first)
    storage.create_bytes("commit", first)  # the retry of a put whose answer was lost
    with pytest.raises(FileExistsError, match="exists already"):
        storage.create_bytes("commit", second)
    assert storage.read_bytes("commit") == first


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
    index = build_photographs(local.child("data"))
    assert build_photographs(storage.child("data")).dataset_id == index.dataset_id
    for entry in index.shards:
        assert list(iterate_shard(storage.child("data"), entry)) == list(
            iterate_shard(local.child("data"), entry)
        )
    loaders = [
        ImageLoader(
            Dataset.open(root.child("data")),
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
