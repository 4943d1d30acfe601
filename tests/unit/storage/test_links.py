from __future__ import annotations

import hashlib
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.links import RefusedObjectError, find_fault_of_link
from fqgan_dist.storage.storage import Storage, locate_file

READS: dict[str, Callable[[Storage, str], object]] = {
    "size": Storage.size,
    "read": Storage.read_bytes,
    "range": lambda storage, name: storage.read_bytes(name, offset=0, length=1),
    "ranges": lambda storage, name: storage.read_ranges([(name, 0, 1)]),
    "stream": lambda storage, name: storage.open_read(name).close(),
    "hash": hash_object,
}
every_read = pytest.mark.parametrize("read", READS.values(), ids=READS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "inside").mkdir(parents=True)
    (tmp_path / "root" / "inside" / "x").write_bytes(b"data")
    return tmp_path / "root"


@every_read
def test_a_link_within_the_root_is_followed(root: Path, read: Callable[..., object]) -> None:
    (root / "file").symlink_to("inside/x")
    (root / "folder").symlink_to("inside")
    for name in ("file", "folder/x"):
        read(Storage(root), name)
    assert Storage(root).read_bytes("folder/x") == b"data"


@every_read
@pytest.mark.parametrize("target", ["absolute", "relative", "in a folder", "over a link"])
def test_a_link_out_of_the_root_is_refused(
    root: Path, target: str, read: Callable[..., object]
) -> None:
    name = "link"
    match target:
        case "absolute":
            (root / name).symlink_to(root.parent / "outside" / "secret")
        case "relative":
            (root / name).symlink_to("../outside/secret")
        case "in a folder":
            (root / "folder").symlink_to(root.parent / "outside")
            name = "folder/secret"
        case _:
            (root.parent / "step").symlink_to(root.parent / "outside" / "secret")
            (root / name).symlink_to("../step")
    with pytest.raises(RefusedObjectError, match="leads out of the folder that was named"):
        read(Storage(root), name)


def test_nothing_is_written_listed_or_deleted_behind_a_link_out_of_the_root(root: Path) -> None:
    (root / "folder").symlink_to(root.parent / "outside")
    storage = Storage(root)
    for use in (
        lambda: storage.write_bytes("folder/new", b"x"),
        lambda: storage.create_bytes("folder/new", b"x"),
        lambda: storage.delete("folder/secret"),
        lambda: storage.list("folder"),
        lambda: list(storage.walk("folder")),
        lambda: list(storage.walk()),
    ):
        with pytest.raises(RefusedObjectError, match="leads out"):
            use()
    assert os.listdir(root.parent / "outside") == ["secret"]


@every_read
def test_pipes_and_sockets_are_refused_without_waiting(
    root: Path, read: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "pipe")
    monkeypatch.chdir(root)  # the path of a socket may have 108 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(RefusedObjectError, match="expected a regular file"):
                read(Storage(root), name)


def test_a_device_is_refused_though_the_user_names_it() -> None:
    with pytest.raises(RefusedObjectError, match="expected a regular file"):
        hash_object(*locate_file("/dev/zero"))


def test_a_circle_of_links_ends(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    with pytest.raises(RefusedObjectError, match="a circle of links"):
        Storage(root).read_bytes("a")
    assert list(Storage(root).walk()) == [("inside/x", 4)]
    assert "circle" in (find_fault_of_link(str(root / "a"), str(root)) or "")


def test_the_root_and_a_file_that_are_named_may_be_links(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    assert Storage(root.parent / "alias").read_bytes("inside/x") == b"data"
    # As in Hugging Face's cache.
    (root / "model.safetensors").symlink_to("../outside/secret")
    storage, name = locate_file(str(root / "model.safetensors"))
    assert pickle.loads(pickle.dumps(storage)).read_bytes(name) == b"secret"
    (root / "other").symlink_to("../outside/secret")
    with pytest.raises(RefusedObjectError):
        storage.read_bytes("other")


def test_a_child_keeps_the_root_that_was_named_in_another_process_too(root: Path) -> None:
    (root / "inside" / "up").symlink_to("../top")
    (root / "top").write_bytes(b"top")
    child = Storage(root).child("inside")
    assert child.read_bytes("up") == b"top"
    assert pickle.loads(pickle.dumps(child)).read_bytes("up") == b"top"
    with pytest.raises(RefusedObjectError):
        Storage(root / "inside").read_bytes("up")


def test_no_more_is_read_than_a_file_may_have(root: Path) -> None:
    storage = Storage(root)
    assert storage.read_limited("inside/x", 4) == b"data"
    with pytest.raises(RefusedObjectError, match="more than 3 bytes"):
        storage.read_limited("inside/x", 3)


def test_memory_is_taken_for_what_is_there_not_for_what_is_asked(root: Path) -> None:
    with pytest.raises(DataError, match="only 4"):
        Storage(root).read_bytes("inside/x", offset=0, length=2**62)


def test_a_hash_ends_one_byte_behind_the_recorded_size(root: Path) -> None:
    os.truncate(root / "inside" / "x", 2**42)  # a sparse file that nobody could hash
    digest, size = hash_object(Storage(root), "inside/x", max_bytes=4)
    assert (digest, size) == (hashlib.sha256(b"data\0").hexdigest(), 2**42)
