"""Every command of `fqgan-data` on a real S3 server, with the same results as on a disk."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.radosgw import S3_BUCKET, Gateway
from support.synthetic_shards import flip_byte, pack

from data_tools.cli import main
from fqgan_dist.data.index import load_index
from fqgan_dist.storage.storage import Storage

pytestmark = pytest.mark.usefixtures("s3_credentials")


@pytest.fixture
def bucket() -> Storage:
    return Storage(f"s3://{S3_BUCKET}/tools-{uuid.uuid4().hex}")


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (24, 20 + number, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write_foreign_shards(storage: Storage) -> None:
    """Three shards of four images of two classes, as somebody else would write them."""
    for shard in range(3):
        members = []
        for number in range(4):
            key = f"{shard}/{number}"
            members += [
                (f"{key}.jpg", jpeg(4 * shard + number)),
                (f"{key}.txt", b"ab"[number % 2 :][:1]),
            ]
        storage.write_bytes(f"foreign/part-{shard}.tar", pack(members))


def run(*arguments: str, code: int = 0) -> None:
    assert main(list(arguments)) == code


def dataset_id(storage: Storage, path: str) -> str:
    return load_index(storage.child(path)).dataset_id


def files(storage: Storage, path: str) -> dict[str, bytes]:
    """The dataset proper; plans name the place of their source."""
    index = load_index(storage.child(path))
    names = [name for entry in index.shards for name in (entry.file, entry.samples_file)]
    return {name: storage.read_bytes(f"{path}/{name}") for name in (*names, "index.json")}


def make_all(storage: Storage, workers: int) -> Sequence[str]:
    """Index foreign shards, and rearrange them in every way; give the datasets' folders."""
    root = storage.root
    write_foreign_shards(storage)
    run("index", f"{root}/foreign", "name=x", "split=train", "class_key=txt", f"workers={workers}")
    run("reshard", f"{root}/foreign", f"{root}/reshard", "samples_per_shard=5", "workers=1")
    parts = "parts={train: 0.75, val: 0.25}"
    run("split", f"{root}/reshard", f"{root}/split", parts, "workers=1")
    sources = [f"{root}/split/{name}" for name in ("train", "val")]
    run("merge", *sources, f"{root}/merge", "name=x", "split=train", "workers=1")
    return "foreign", "reshard", "split/train", "split/val", "merge"


def test_every_command_gives_the_same_bytes_in_a_bucket(bucket: Storage, disk: Storage) -> None:
    # Processes only here: what they do must not depend on the storage either.
    folders = make_all(bucket, workers=2)
    make_all(disk, workers=1)
    for folder in folders:
        assert files(bucket, folder) == files(disk, folder)


def test_verify_and_stats_read_a_bucket(
    bucket: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    write_foreign_shards(bucket)
    uri = f"{bucket.root}/foreign"
    run("index", uri, "name=x", "split=train", "class_key=txt", "workers=1")
    run("verify", uri)
    run("verify", uri, "deep=true", "workers=1")
    capsys.readouterr()
    run("stats", uri, "--json")
    assert json.loads(capsys.readouterr().out)["num_samples"] == 12
    flip_byte(bucket, "foreign/part-1.tar", 700)
    bucket.delete("foreign/part-2.samples.parquet")
    run("verify", uri, "deep=true", "workers=1", code=3)
    output = capsys.readouterr().out
    assert "part-1.tar: its sha256 is" in output
    assert "part-1.tar: 1/0: " in output
    assert "part-2.samples.parquet: " in output


def test_a_finished_index_in_a_bucket_is_not_made_again(
    bucket: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    write_foreign_shards(bucket)
    arguments = ["index", f"{bucket.root}/foreign", "name=x", "split=train", "class_key=txt"]
    run(*arguments, "workers=1")
    before = dataset_id(bucket, "foreign")
    capsys.readouterr()
    run(*arguments)
    assert "nothing was done" in capsys.readouterr().out
    assert dataset_id(bucket, "foreign") == before


def test_no_message_holds_the_secret(
    gateway: Gateway,
    bucket: Storage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + gateway.secret_key)
    run("verify", bucket.root, code=1)
    output = capsys.readouterr()
    assert "DataError" in output.err
    assert gateway.secret_key not in output.out + output.err
