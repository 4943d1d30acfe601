from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "root")


def test_written_bytes_are_read_back(storage: Storage) -> None:
    storage.write_bytes("a/b/c.json", b"hello")
    assert storage.read_bytes("a/b/c.json") == b"hello"
    assert storage.read_bytes("a/b/c.json", offset=1, length=2) == b"el"
    assert storage.read_bytes("a/b/c.json", offset=3) == b"lo"
    assert storage.size("a/b/c.json") == 5


def test_write_replaces_the_whole_object(storage: Storage) -> None:
    storage.write_bytes("x", b"a long first version")
    storage.write_bytes("x", b"short")
    assert storage.read_bytes("x") == b"short"


def test_a_local_file_replaces_the_whole_object(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = os.urandom(2**20) * 9  # more than one piece of the copy
    source.write_bytes(data)
    storage.write_bytes("a/x", b"a former version")
    storage.write_file("a/x", source)
    assert storage.read_bytes("a/x") == data
    assert storage.list("a") == ["x"]


def test_ranges_are_read_in_the_order_asked_for(storage: Storage) -> None:
    storage.write_bytes("x", b"0123456789")
    storage.write_bytes("y", b"abc")
    assert storage.read_ranges([("y", 1, 2), ("x", 7, 3), ("x", 0, 1)]) == [b"bc", b"789", b"0"]


def test_range_beyond_the_end_is_an_error(storage: Storage) -> None:
    storage.write_bytes("x", b"0123")
    with pytest.raises(DataError, match="has no 3 bytes at offset 2, only 2"):
        storage.read_bytes("x", offset=2, length=3)
    with pytest.raises(DataError, match="has no 3 bytes at offset 2, only 2"):
        storage.read_ranges([("x", 0, 1), ("x", 2, 3)])


def test_missing_object_is_file_not_found(storage: Storage) -> None:
    storage.write_bytes("folder/x", b"")
    for path in ("none", "folder", "folder/x/below"):
        assert not storage.exists(path)
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.read_bytes(path)
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.open_read(path)


def test_create_refuses_another_object_of_that_name(storage: Storage) -> None:
    storage.create_bytes("commit", b"first")
    with pytest.raises(FileExistsError, match="exists already"):
        storage.create_bytes("commit", b"second")
    assert storage.read_bytes("commit") == b"first"


def test_create_of_the_same_bytes_counts_as_a_lost_answer(storage: Storage) -> None:
    storage.create_bytes("commit", b"first")
    storage.create_bytes("commit", b"first")


def test_of_many_creators_exactly_one_wins(storage: Storage) -> None:
    won: list[int] = []
    start = threading.Barrier(8)

    def create(number: int) -> None:
        start.wait()
        try:
            storage.create_bytes("commits/1", str(number).encode())
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(number).encode() for number in won] == [storage.read_bytes("commits/1")]


def test_list_names_what_is_directly_below(storage: Storage) -> None:
    for path in ("b", "a/x", "a/y/z"):
        storage.write_bytes(path, b"")
    assert storage.list() == ["a", "b"]
    assert storage.list("a") == ["x", "y"]
    assert storage.list("nothing") == []
    assert storage.list("b") == []
    assert storage.list("b/below") == []


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


def test_delete_of_a_missing_object_is_no_error(storage: Storage) -> None:
    storage.write_bytes("x", b"")
    storage.delete("x")
    storage.delete("x")
    storage.delete("folder/x")
    assert not storage.exists("x")


def test_open_read_is_seekable(storage: Storage) -> None:
    storage.write_bytes("x", b"0123456789")
    with storage.open_read("x") as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == b"89"


def test_walk_gives_what_a_bucket_would(storage: Storage, tmp_path: Path) -> None:
    names = ["a-b", "a/x", "a/y/z", "a.b", "b", "\u00e4", "\U0001f600", "\uff5e"]
    for name in names:
        storage.write_bytes(name, name.encode())
    other = tmp_path / "other"
    other.mkdir()
    (other / "linked").write_bytes(b"12")
    root = Path(storage.root)
    (root / "a" / "link").symlink_to(other)
    (root / "broken").symlink_to(tmp_path / "nothing")
    os.mkfifo(root / "pipe")
    (root / "empty").mkdir()
    (root / "a" / ".x.writing-0123").write_bytes(b"of a killed writer")
    expected = [(name, len(name.encode())) for name in names] + [("a/link/linked", 2)]
    assert list(storage.walk()) == sorted(expected, key=lambda entry: os.fsencode(entry[0]))
    assert list(storage.walk("a")) == [("link/linked", 2), ("x", 3), ("y/z", 5)]
    assert list(storage.walk("none")) == list(storage.walk("b")) == []


def test_walk_refuses_a_circle_of_links(storage: Storage) -> None:
    storage.write_bytes("a/x", b"")
    (Path(storage.root) / "a" / "up").symlink_to(storage.root)
    with pytest.raises(DataError, match=r"a/up: a link to a folder that it lies in"):
        list(storage.walk())


def test_download_copies_and_hashes(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(2**20) * 9 + b"end"
    storage.write_bytes("a/x", data)
    came: list[int] = []
    copied = storage.download("a/x", tmp_path / "copy", progress=came.append)
    assert copied == (hashlib.sha256(data).hexdigest(), len(data))
    assert sum(came) == len(data)
    assert (tmp_path / "copy").read_bytes() == data
    assert (tmp_path / "copy").stat().st_mode & 0o111 == 0
    storage.write_bytes("empty", b"")
    assert storage.download("empty", tmp_path / "none") == (hashlib.sha256().hexdigest(), 0)
    assert (tmp_path / "none").read_bytes() == b""


def test_download_to_a_full_disk_is_told_apart(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("x", b"1")
    os.truncate(storage.uri("x"), 2**42)  # a sparse file: larger than the disk
    with pytest.raises(OSError, match="No space left") as caught:
        storage.download("x", tmp_path / "copy")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "copy").exists()


def test_download_replaces_no_file(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("x", b"1")
    (tmp_path / "copy").write_bytes(b"mine")
    with pytest.raises(OSError, match="exists") as caught:
        storage.download("x", tmp_path / "copy")
    assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "copy").read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError, match="no such object"):
        storage.download("none", tmp_path / "other")
    assert storage.num_retries == 0


def test_a_missing_file_is_named_among_many(storage: Storage) -> None:
    storage.write_bytes("x", b"0123")
    with pytest.raises(FileNotFoundError, match="root/gone"):
        storage.read_ranges([("x", 0, 1), ("gone", 0, 1)])


def test_child_has_the_folder_as_its_root(storage: Storage) -> None:
    storage.child("a/b").write_bytes("c", b"1")
    assert storage.read_bytes("a/b/c") == b"1"
    assert storage.child("") == storage
    assert Storage("s3://bucket/p/").child("q").uri("r") == "s3://bucket/p/q/r"


def test_local_path_exists_only_for_directories(storage: Storage) -> None:
    assert storage.local_path("a") == Path(storage.root, "a")
    assert Storage("s3://bucket").local_path("a") is None


def test_storage_survives_pickling(storage: Storage) -> None:
    storage.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\0b"]
)
def test_path_that_could_leave_the_root_is_refused(storage: Storage, path: str) -> None:
    with pytest.raises(ValueError, match="expected a relative path below the storage root"):
        storage.read_bytes(path)


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
