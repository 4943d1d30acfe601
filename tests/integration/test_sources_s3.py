"""Sources in a bucket are read where they are, by ranges."""

from __future__ import annotations

import io
import pickle
import tempfile
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.datasets import build_photographs
from support.radosgw import S3_BUCKET
from support.source_files import png, tar_bytes

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.sources.opening import open_source
from fqgan_dist.storage.storage import Storage

pytestmark = pytest.mark.usefixtures("s3_credentials")

MEMBERS = {"a/1.JPEG": png(1), "b/2.png": png(2)}
NAMES = list(MEMBERS)


@pytest.fixture
def storage() -> Storage:
    return Storage(f"s3://{S3_BUCKET}/sources-{uuid.uuid4().hex}")


@pytest.fixture
def no_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let whoever makes a local copy fail."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))


def write(storage: Storage, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(name, data)


def zip_bytes(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.usefixtures("no_temporary_files")
@pytest.mark.parametrize("kind", ["folder", "tar", "class tars", "zip", "manifest"])
def test_a_source_in_a_bucket_is_read_in_place(storage: Storage, kind: str) -> None:
    uri, options = storage.root, {}
    match kind:
        case "folder":
            write(storage, MEMBERS | {"README.md": b"hello", "a/deep/3.png": png(3)})
        case "tar":
            write(storage, {"x.tar": tar_bytes(MEMBERS.items())})
            uri = storage.uri("x.tar")
        case "class tars":
            inner = {f"{name[0]}.tar": tar_bytes([(name[2:], MEMBERS[name])]) for name in MEMBERS}
            write(storage, {"x.tar": tar_bytes(inner.items())})
            uri = storage.uri("x.tar")
        case "zip":
            write(storage, {"x.zip": zip_bytes(MEMBERS)})
            uri = storage.uri("x.zip")
        case _:
            write(storage, {f"files/{name}": data for name, data in MEMBERS.items()})
            rows = "".join(f"{name},{name[0]}\n" for name in [*MEMBERS, "b/gone.png"])
            write(storage, {"lists/m.csv": f"path,class\n{rows}".encode()})
            uri, options = storage.uri("lists/m.csv"), {"root": storage.uri("files")}
    with open_source(uri, **options) as source:
        assert source.names == NAMES
        assert source.is_shared_by_nodes
        reader = pickle.loads(pickle.dumps(source.reader))
        found = [reader.read(name, source.place(row)) for row, name in enumerate(NAMES)]
        assert found == list(MEMBERS.values())
        odd = {"folder": ["README.md", "a/deep/3.png"], "manifest": ["b/gone.png"]}
        assert [problem.name for problem in source.problems] == odd.get(kind, [])


def test_compressed_tars_and_parquet_are_unpacked_to_this_machine(storage: Storage) -> None:
    table = pa.table({"jpg": list(MEMBERS.values()), "class": ["a", "b"]})
    file = io.BytesIO()
    pq.write_table(table, file)
    write(
        storage,
        {"x.tar.gz": tar_bytes(MEMBERS.items(), mode="w:gz"), "x.parquet": file.getvalue()},
    )
    for name in ("x.tar.gz", "x.parquet"):
        with open_source(storage.uri(name)) as source:
            assert [source.read(row) for row in range(2)] == list(MEMBERS.values())
            assert not source.is_shared_by_nodes


def test_a_dataset_in_a_bucket_is_listed_by_its_tables(storage: Storage, tmp_path: Path) -> None:
    index = build_photographs(storage.child("data"))
    build_photographs(Storage(tmp_path / "data"))
    with (
        open_source(storage.uri("data")) as source,
        open_source(str(tmp_path / "data")) as local,
    ):
        assert source.keys == local.keys
        assert source.names == local.names
        assert source.class_names() == index.classes
        assert source.read(5) == local.read(5)


def test_foreign_shards_in_a_bucket_are_scanned(storage: Storage) -> None:
    for number in range(3):
        members = [(f"{number}.png", png(number)), (f"{number}.cls", str(number).encode())]
        write(storage, {f"shard-{number}.tar": tar_bytes(members)})
    for uri in (storage.root, storage.uri("shard-{0..2}.tar")):
        with open_source(uri) as source:
            assert source.keys == ["0", "1", "2"]
            assert [source.read(row) for row in range(3)] == [png(0), png(1), png(2)]


def test_an_object_that_changed_is_named(storage: Storage) -> None:
    write(storage, MEMBERS | {"c/3.png": png(3)})
    with open_source(storage.root) as source:
        write(storage, {"a/1.JPEG": png(1) + b"x", "b/2.png": b"x"})
        storage.delete("c/3.png")
        for row in range(3):
            with pytest.raises(DataError, match="changed while it was read"):
                source.read(row)


def test_missing_sources_are_named(storage: Storage) -> None:
    for name in ("x.tar", "x.tar.gz", "x.zip", "x.parquet", "x.csv", "folder", "s-{0..1}.tar"):
        with pytest.raises(DataError, match=name[:1] + r".*(no such|missing)"):
            open_source(storage.uri(name)).__enter__()
