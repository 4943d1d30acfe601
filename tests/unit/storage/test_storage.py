from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.storage.storage import Storage, locate_file


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "root")


def test_temporary_file_of_a_killed_writer_is_not_listed(storage: Storage, tmp_path: Path) -> None:
    # The writer dies between its fsync and its rename, as at a power cut.
    code = (
        "import os, sys; from fqgan_dist.storage.storage import Storage\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "Storage(sys.argv[1]).write_bytes('a/x', b'new')"
    )
    storage.write_bytes("a/x", b"old")
    done = subprocess.run([sys.executable, "-c", code, storage.root], check=False)
    assert done.returncode == 9
    assert len(os.listdir(tmp_path / "root" / "a")) == 2
    assert storage.list("a") == ["x"]
    assert storage.read_bytes("a/x") == b"old"


def test_nothing_is_left_beside_an_object(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("a/x", b"1")
    storage.create_bytes("a/y", b"1")
    with pytest.raises(FileExistsError):
        storage.create_bytes("a/y", b"2")
    assert sorted(os.listdir(tmp_path / "root" / "a")) == ["x", "y"]


def test_walk_gives_what_a_bucket_would(storage: Storage, tmp_path: Path) -> None:
    names = ["a-b", "a/x", "a/y/z", "a.b", "b", "\u00e4", "\U0001f600", "\uff5e"]
    for name in names:
        storage.write_bytes(name, name.encode())
    root = Path(storage.root)
    (root / "a" / "link").symlink_to(root / "c")
    (root / "c").mkdir()
    (root / "c" / "linked").write_bytes(b"12")
    (root / "broken").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe")
    (root / "empty").mkdir()
    (root / "a" / ".x.writing-0123").write_bytes(b"of a killed writer")
    expected = [(name, len(name.encode())) for name in names] + [
        ("a/link/linked", 2),
        ("c/linked", 2),
    ]
    assert list(storage.walk()) == sorted(expected, key=lambda entry: os.fsencode(entry[0]))
    assert list(storage.walk("a")) == [("link/linked", 2), ("x", 3), ("y/z", 5)]
    assert list(storage.walk("none")) == list(storage.walk("b")) == []


def test_walk_refuses_a_circle_of_links(storage: Storage) -> None:
    storage.write_bytes("a/x", b"")
    (Path(storage.root) / "a" / "up").symlink_to(storage.root)
    with pytest.raises(DataError, match=r"a/up: a link to a folder that it lies in"):
        list(storage.walk())


def test_download_to_a_full_disk_is_told_apart(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("x", b"1")
    os.truncate(storage.uri("x"), 2**42)  # a sparse file: larger than the disk
    with pytest.raises(OSError, match="No space left") as caught:
        storage.download("x", tmp_path / "copy")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "copy").exists()


def test_a_bucket_has_children_without_being_asked() -> None:
    assert Storage("s3://bucket/p/").child("q").uri("r") == "s3://bucket/p/q/r"


@pytest.mark.parametrize(
    ("uri", "root", "name"),
    [
        ("/a/b.npz", "/a", "b.npz"),
        ("/b.npz", "/", "b.npz"),
        ("b.npz", os.getcwd(), "b.npz"),
        ("a/../b.npz", os.getcwd(), "b.npz"),
        (".", os.path.dirname(os.getcwd()), os.path.basename(os.getcwd())),
        ("s3://bucket/b.npz", "s3://bucket", "b.npz"),
        ("s3://bucket/a/b-{0..9}.tar", "s3://bucket/a", "b-{0..9}.tar"),
    ],
)
def test_a_file_is_located_in_its_folder(uri: str, root: str, name: str) -> None:
    assert locate_file(uri) == (Storage(root), name)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "names no file"),
        ("a/", "names no file"),
        ("s3://bucket", "names no file"),
        ("s3://bucket/a/", "names no file"),
        ("s3://", "names no bucket"),
        ("s3:///a", "names no bucket"),
        ("gs://bucket/a", "unknown scheme; expected a path or s3://bucket/prefix"),
        ("s3://key:secret@bucket", "credentials or a port"),
        ("s3://key:secret@bucket/", "credentials or a port"),
        ("s3://key:secret@bucket/a", "credentials or a port"),
    ],
)
def test_what_names_no_file_of_a_store_is_a_config_error(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        locate_file(uri)
    assert "secret" not in str(caught.value)


def test_local_path_exists_only_for_directories(storage: Storage) -> None:
    assert storage.local_path("a") == Path(storage.root, "a")
    assert Storage("s3://bucket").local_path("a") is None


@given(st.text(max_size=20))
def test_no_accepted_path_leaves_the_root(path: str) -> None:
    storage = Storage("/some/storage")
    try:
        uri = storage.uri(path)
    except ValueError:
        return
    assert os.path.normpath(uri) == uri
    assert uri.startswith("/some/storage/")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("gs://bucket/x", "unknown scheme"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://key:secret@bucket/x", "credentials or a port"),
        ("s3://bucket/x?versionId=1", "not allowed"),
        ("s3://bucket/x/../y", "expected s3://bucket/prefix"),
        ("s3://bucket//x", "expected s3://bucket/prefix"),
    ],
)
def test_wrong_root_is_a_config_error(root: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Storage(root)
    assert "secret" not in str(caught.value)


def test_file_in_the_place_of_the_root_is_a_data_error(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "root").write_text("a file where the root should be")
    with pytest.raises(DataError, match="a file is where a folder should be"):
        storage.write_bytes("x", b"")


def test_unreadable_file_is_a_data_error(storage: Storage, request: pytest.FixtureRequest) -> None:
    storage.write_bytes("x", b"")
    os.chmod(storage.uri("x"), 0)
    request.getfixturevalue("without_root")
    with pytest.raises(DataError, match="access is refused"):
        storage.read_bytes("x")


def test_library_does_not_import_s3fs_for_local_roots(storage: Storage) -> None:
    code = (
        "import sys; from fqgan_dist.storage.storage import Storage\n"
        "Storage(sys.argv[1]).write_bytes('x', b''); assert 's3fs' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, storage.root], check=True)


def test_a_private_root_is_closed_to_others_and_one_that_is_there_stays_as_it_is(
    tmp_path: Path,
) -> None:
    root = tmp_path / "runs" / "mine"
    Storage(root).make_private()
    Storage(root).write_bytes("a/b", b"x")
    assert stat.S_IMODE(root.stat().st_mode) == 0o750
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o777 & ~_umask()
    root.chmod(0o755)
    Storage(root).make_private()
    assert stat.S_IMODE(root.stat().st_mode) == 0o755


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("offset", [2**40, 2**63 - 1, 2**63, 2**64])
def test_a_part_far_beyond_the_end_is_a_short_object(storage: Storage, offset: int) -> None:
    storage.write_bytes("a", b"123")
    with pytest.raises(DataError, match=f"has no 5 bytes at offset {offset}, only 0"):
        storage.read_bytes("a", offset=offset, length=5)
