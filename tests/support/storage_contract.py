"""What every store promises, as tests that are applied to each of them in one line.

    class TestMyStore(StorageContract):
        store_fixture = "my_store"

where `my_store` is a fixture that gives a `Store`. What only one kind of store can show (power
cuts, links, lost connections, wrong credentials) has tests of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

MIB = 2**20
LARGE = os.urandom(MIB) * 20 + b"end"
"""More than two of the parts in which stores read, and not a multiple of them."""

ODD_NAMES = [
    "a b", "a%20b", "a+b", "a&b<c>", "a'b\"c", "a=b;c", "a:b", "a,b@c", "~a", "(a)", "[a]",
    "{0..1}", "a*", "a?b", "a#b", "a|b", "a^b`c", "$a!", ".hidden", "-a",
    "ends.", "a..b", "a\tb", "a\nb",
    "\u00e4", "\uff5e", "\U0001f600", "\u4e2d" * 80,
]  # fmt: skip

LEAVING_PATHS = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\0b"]

CALLS: dict[str, Callable[[Storage, str], object]] = {
    "size": lambda storage, path: storage.size(path),
    "exists": lambda storage, path: storage.exists(path),
    "read_bytes": lambda storage, path: storage.read_bytes(path),
    "read_ranges": lambda storage, path: storage.read_ranges([(path, 0, 1)]),
    "open_read": lambda storage, path: storage.open_read(path),
    "write_bytes": lambda storage, path: storage.write_bytes(path, b"1"),
    "create_bytes": lambda storage, path: storage.create_bytes(path, b"1"),
    "replace_bytes": lambda storage, path: storage.replace_bytes(path, b"1", former=b"0"),
    "delete": lambda storage, path: storage.delete(path),
    "list": lambda storage, path: storage.list(path),
    "walk": lambda storage, path: list(storage.walk(path)),
}
READS = ("size", "read_bytes", "read_ranges", "open_read", "replace_bytes")


@dataclass(frozen=True)
class Store:
    """An empty place in a store."""

    root: str
    refuse: Callable[[], None]
    """From now on the store refuses whatever a new `Storage` of this process asks for."""


class StorageContract:
    """The promises of `Storage` that no backend may break."""

    store_fixture: ClassVar[str]

    @pytest.fixture
    def store(self, request: pytest.FixtureRequest) -> Store:
        return request.getfixturevalue(self.store_fixture)

    @pytest.fixture
    def storage(self, store: Store) -> Storage:
        return Storage(store.root)

    # Whole objects and ranges

    def test_written_bytes_are_read_back(self, storage: Storage) -> None:
        storage.write_bytes("a/b/c.json", b"hello")
        assert storage.read_bytes("a/b/c.json") == b"hello"
        assert storage.read_bytes("a/b/c.json", offset=1, length=2) == b"el"
        assert storage.read_bytes("a/b/c.json", offset=3) == b"lo"
        assert storage.read_bytes("a/b/c.json", offset=5) == b""
        assert storage.read_bytes("a/b/c.json", offset=2, length=0) == b""
        assert storage.size("a/b/c.json") == 5
        assert storage.exists("a/b/c.json")
        assert storage.num_retries == 0

    def test_an_empty_object_is_an_object(self, storage: Storage) -> None:
        storage.write_bytes("empty", b"")
        assert storage.read_bytes("empty") == b""
        assert storage.size("empty") == 0
        assert storage.exists("empty")
        with storage.open_read("empty") as stream:
            assert stream.read() == b""
        assert list(storage.walk()) == [("empty", 0)]

    def test_write_replaces_the_whole_object(self, storage: Storage) -> None:
        storage.write_bytes("x", b"a long first version")
        storage.write_bytes("x", b"short")
        assert storage.read_bytes("x") == b"short"
        assert storage.size("x") == 5

    def test_a_view_is_written_like_bytes(self, storage: Storage) -> None:
        buffer = bytearray(LARGE)
        storage.write_bytes("x", memoryview(buffer))
        storage.write_bytes("y", memoryview(buffer)[3:7])
        buffer[:] = bytes(len(buffer))  # the caller uses it again
        assert storage.read_bytes("x") == LARGE
        assert storage.read_bytes("y") == LARGE[3:7]

    def test_a_local_file_replaces_the_whole_object(self, storage: Storage, tmp_path: Path) -> None:
        source = tmp_path / "source"
        storage.write_bytes("a/x", b"a former version")
        for data in (b"short", b"", LARGE):
            source.write_bytes(data)
            storage.write_file("a/x", source)
            assert storage.read_bytes("a/x") == data
        assert storage.list("a") == ["x"]

    def test_large_objects_are_read_in_parts(self, storage: Storage) -> None:
        storage.write_bytes("large", LARGE)
        assert storage.size("large") == len(LARGE)
        assert storage.read_bytes("large") == LARGE
        assert storage.read_bytes("large", offset=5, length=17 * MIB) == LARGE[5 : 5 + 17 * MIB]
        assert storage.read_bytes("large", offset=len(LARGE) - 3) == b"end"

    def test_ranges_are_read_in_the_order_asked_for(self, storage: Storage) -> None:
        storage.write_bytes("x", b"0123456789")
        storage.write_bytes("y", b"abc")
        ranges = [("y", 1, 2), ("x", 7, 3), ("x", 0, 1), ("x", 3, 0)] * 20
        assert storage.read_ranges(ranges) == [b"bc", b"789", b"0", b""] * 20
        assert storage.read_ranges([]) == []

    def test_range_beyond_the_end_is_an_error(self, storage: Storage) -> None:
        storage.write_bytes("x", b"0123")
        for offset, there in ((2, 2), (4, 0), (9, 0)):
            message = f"has no 3 bytes at offset {offset}, only {there}"
            with pytest.raises(DataError, match=message):
                storage.read_bytes("x", offset=offset, length=3)
            with pytest.raises(DataError, match=message):
                storage.read_ranges([("x", 0, 1), ("x", offset, 3)])

    def test_negative_ranges_are_refused(self, storage: Storage) -> None:
        storage.write_bytes("x", b"0123")
        with pytest.raises(ValueError, match="must not be negative"):
            storage.read_bytes("x", offset=-1)
        with pytest.raises(ValueError, match="must not be negative"):
            storage.read_ranges([("x", 0, -1)])

    # Streams and downloads

    def test_a_stream_is_read_anywhere(self, storage: Storage) -> None:
        storage.write_bytes("x", b"0123456789")
        with storage.open_read("x") as stream:
            assert stream.read(4) == b"0123"
            assert stream.tell() == 4
            stream.seek(-2, os.SEEK_END)
            assert stream.read() == b"89"
            stream.seek(1)
            stream.seek(2, os.SEEK_CUR)
            assert stream.read(2) == b"34"
            stream.seek(99)
            assert stream.read(1) == b""
        assert stream.closed

    def test_a_stream_is_read_in_pieces(self, storage: Storage) -> None:
        storage.write_bytes("large", LARGE)
        with storage.open_read("large") as stream:
            assert b"".join(iter(lambda: stream.read(700_001), b"")) == LARGE
            stream.seek(9 * MIB)
            assert stream.read(10) == LARGE[9 * MIB : 9 * MIB + 10]

    def test_a_stream_never_mixes_versions(self, storage: Storage) -> None:
        storage.write_bytes("large", b"0" * len(LARGE))
        with storage.open_read("large") as stream:
            first = stream.read(1)
            storage.write_bytes("large", b"1" * len(LARGE))
            try:
                rest = stream.read()
            except DataError as error:
                assert "was replaced while it was read" in str(error)  # noqa: PT017 (or the old one)
            else:
                assert first + rest == b"0" * len(LARGE)

    def test_download_copies_and_hashes(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("a/x", LARGE)
        came: list[int] = []
        copied = storage.download("a/x", tmp_path / "copy", progress=came.append)
        assert copied == (hashlib.sha256(LARGE).hexdigest(), len(LARGE))
        assert sum(came) == len(LARGE)
        assert (tmp_path / "copy").read_bytes() == LARGE
        assert (tmp_path / "copy").stat().st_mode & 0o111 == 0
        storage.write_bytes("empty", b"")
        assert storage.download("empty", tmp_path / "none") == (hashlib.sha256().hexdigest(), 0)
        assert (tmp_path / "none").read_bytes() == b""

    def test_a_download_that_fails_leaves_nothing(self, storage: Storage, tmp_path: Path) -> None:
        target = tmp_path / "targets"
        target.mkdir()
        storage.write_bytes("x", b"0123")
        (target / "taken").write_bytes(b"mine")
        with pytest.raises(OSError, match="exists") as caught:
            storage.download("x", target / "taken")
        assert caught.value.errno == errno.EEXIST
        assert caught.value.filename == str(target / "taken")
        assert (target / "taken").read_bytes() == b"mine"

        def give_up(num_bytes: int) -> None:
            raise TimeoutError("the caller gave up")

        with pytest.raises(DataError, match="the caller gave up"):
            storage.download("x", target / "copy", progress=give_up)
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.download("none", target / "copy")
        assert [path.name for path in target.iterdir()] == ["taken"]

    # Races

    def test_create_refuses_another_object_of_that_name(self, storage: Storage) -> None:
        storage.create_bytes("commit", b"first")
        with pytest.raises(FileExistsError, match="exists already"):
            storage.create_bytes("commit", b"second")
        assert storage.read_bytes("commit") == b"first"

    def test_create_of_the_same_bytes_is_a_success(self, storage: Storage) -> None:
        storage.create_bytes("commit", b"first")
        storage.create_bytes("commit", b"first")
        assert storage.read_bytes("commit") == b"first"

    def test_a_create_whose_answer_was_lost_is_a_success(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create = storage._backend.create

        def create_twice(uri: str, data: bytes) -> None:
            create(uri, data)  # done, but the client heard nothing of it and asks again
            create(uri, data)

        monkeypatch.setattr(storage._backend, "create", create_twice)
        storage.create_bytes("commit", b"first")
        assert storage.read_bytes("commit") == b"first"
        with pytest.raises(FileExistsError, match="exists already"):
            storage.create_bytes("commit", b"second")
        assert storage.read_bytes("commit") == b"first"

    def test_replace_refuses_an_object_of_other_bytes(self, storage: Storage) -> None:
        storage.write_bytes("index", b"first")
        for former in (b"other", b"first"[:-1], b"first!", b""):
            with pytest.raises(FileExistsError, match="exists already"):
                storage.replace_bytes("index", b"second", former=former)
        assert storage.read_bytes("index") == b"first"
        storage.replace_bytes("index", b"second", former=b"first")
        assert storage.read_bytes("index") == b"second"
        storage.replace_bytes("index", b"second", former=b"first")  # the answer was lost
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.replace_bytes("none", b"second", former=b"first")

    def test_of_many_creators_exactly_one_wins(self, storage: Storage) -> None:
        def create(own: Storage, data: bytes) -> None:
            own.create_bytes("commits/1", data)

        won = _race(storage, create)
        assert [storage.read_bytes("commits/1")] == won

    def test_of_many_replacers_exactly_one_wins(self, storage: Storage) -> None:
        storage.write_bytes("index", b"first")

        def replace(own: Storage, data: bytes) -> None:
            own.replace_bytes("index", data, former=b"first")

        won = _race(storage, replace)
        assert [storage.read_bytes("index")] == won

    def test_a_reader_sees_one_version_of_an_object_that_is_replaced(
        self, storage: Storage
    ) -> None:
        size = MIB
        storage.write_bytes("x", b"0" * size)

        def replace() -> None:
            for version in range(1, 21):
                storage.write_bytes("x", str(version % 10).encode() * size)

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(replace)
            num_reads = 0
            while not writing.done() or not num_reads:
                data = storage.read_bytes("x")
                assert data == data[:1] * size
                num_reads += 1
            writing.result()
        assert storage.read_bytes("x") == b"0" * size

    def test_another_writers_object_is_seen_at_once(self, storage: Storage) -> None:
        other = Storage(storage.root)
        assert storage.list("commits") == []
        other.create_bytes("commits/1", b"1")
        assert storage.list("commits") == ["1"]
        assert storage.exists("commits/1")
        other.delete("commits/1")
        assert storage.list("commits") == []
        assert not storage.exists("commits/1")

    def test_many_threads_share_a_storage(self, storage: Storage) -> None:
        def use(number: int) -> bytes:
            storage.write_bytes(f"{number}", str(number).encode() * 1000)
            return storage.read_bytes(f"{number}")

        with ThreadPoolExecutor(16) as pool:
            read = list(pool.map(use, range(64)))
        assert read == [str(number).encode() * 1000 for number in range(64)]

    # Listing and deletion

    def test_list_names_what_is_directly_below(self, storage: Storage) -> None:
        for path in ("b", "a/x", "a/y/z", "ab/c"):
            storage.write_bytes(path, b"")
        assert storage.list() == ["a", "ab", "b"]
        assert storage.list("a") == ["x", "y"]
        assert storage.list("a/y") == ["z"]
        assert storage.list("nothing") == []
        assert storage.list("b") == []
        assert storage.list("b/below") == []

    def test_walk_gives_all_below_in_the_order_of_bytes(self, storage: Storage) -> None:
        names = ["a-b", "a/x", "a/y/z", "a.b", "ab", "a0", "b", "\u00e4", "\U0001f600", "\uff5e"]
        for name in names:
            storage.write_bytes(name, name.encode())
        expected = [(name, len(name.encode())) for name in sorted(names, key=str.encode)]
        assert list(storage.walk()) == expected
        assert list(storage.walk("a")) == [("x", 3), ("y/z", 5)]
        assert list(storage.walk("none")) == list(storage.walk("b")) == []

    def test_more_names_than_a_page_holds_are_listed(self, storage: Storage) -> None:
        names = [f"{number:04}" for number in range(1001)]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda name: storage.write_bytes(f"many/{name}", b"1"), names))
            list(pool.map(lambda name: storage.write_bytes(f"folders/{name}/x", b""), names[:3]))
        assert storage.list("many") == names
        assert list(storage.walk("many")) == [(name, 1) for name in names]
        assert storage.list() == ["folders", "many"]
        assert storage.list("folders") == names[:3]

    def test_odd_names_are_names(self, storage: Storage) -> None:
        for number, name in enumerate(ODD_NAMES):
            storage.write_bytes(f"odd/{name}", bytes(number))
            storage.create_bytes(f"folders/{name}/x", b"x")
        assert storage.list("odd") == storage.list("folders") == sorted(ODD_NAMES)
        expected = [(name, ODD_NAMES.index(name)) for name in sorted(ODD_NAMES, key=str.encode)]
        assert list(storage.walk("odd")) == expected
        for number, name in enumerate(ODD_NAMES):
            assert storage.read_bytes(f"odd/{name}") == bytes(number)
            assert storage.list(f"folders/{name}") == ["x"]
            storage.delete(f"odd/{name}")
        assert storage.list("odd") == []

    def test_delete_of_what_is_no_object_is_no_error(self, storage: Storage) -> None:
        storage.write_bytes("x", b"")
        storage.write_bytes("folder/y", b"")
        storage.delete("x")
        storage.delete("x")
        storage.delete("none/x")
        storage.delete("folder/y/below")
        storage.delete("folder")
        assert not storage.exists("x")
        assert storage.list("folder") == ["y"]

    # Errors

    @pytest.mark.parametrize("call", READS)
    def test_missing_object_is_file_not_found(self, storage: Storage, call: str) -> None:
        storage.write_bytes("folder/x", b"")
        for path in ("none", "folder", "folder/x/below"):
            assert not storage.exists(path)
            with pytest.raises(FileNotFoundError, match="no such object") as caught:
                CALLS[call](storage, path)
            assert caught.value.filename == storage.uri(path)

    def test_a_missing_object_is_named_among_many(self, storage: Storage) -> None:
        storage.write_bytes("x", b"0123")
        with pytest.raises(FileNotFoundError) as caught:
            storage.read_ranges([("x", 0, 1), ("gone", 0, 1), ("x", 1, 1)])
        assert caught.value.filename == storage.uri("gone")

    def test_a_refusal_is_a_data_error(self, storage: Storage, store: Store) -> None:
        storage.write_bytes("folder/x", b"1")
        store.refuse()
        refused = Storage(store.root)
        for name, call in CALLS.items():
            with pytest.raises(DataError, match="access is refused") as caught:
                call(refused, "folder" if name in ("list", "walk") else "folder/x")
            assert store.root in str(caught.value), name

    @pytest.mark.parametrize("path", LEAVING_PATHS)
    def test_path_that_could_leave_the_root_is_refused(self, storage: Storage, path: str) -> None:
        for name, call in CALLS.items():
            if path or name not in ("list", "walk"):  # there it is the root itself
                with pytest.raises(ValueError, match="expected a relative path below the storage"):
                    call(storage, path)

    # Roots

    def test_child_has_the_folder_as_its_root(self, storage: Storage) -> None:
        child = storage.child("a/b")
        child.write_bytes("c", b"1")
        assert storage.read_bytes("a/b/c") == b"1"
        assert child.uri("c") == storage.uri("a/b/c")
        assert child == storage.child("a").child("b") == Storage(child.root)
        assert storage.child("") == storage
        assert list(child.walk()) == [("c", 1)]
        with pytest.raises(ValueError, match="expected a relative path"):
            storage.child("..")

    def test_storage_survives_pickling(self, storage: Storage) -> None:
        storage.write_bytes("x", b"1")
        for each in (storage, storage.child("a")):
            copy = pickle.loads(pickle.dumps(each))
            assert copy == each
            assert hash(copy) == hash(each)
        assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def _race(storage: Storage, write: Callable[[Storage, bytes], None]) -> list[bytes]:
    """Let 16 threads write at once, by one client and several; give what the winners wrote."""
    start = threading.Barrier(16)

    def attempt(number: int) -> bytes | None:
        own = storage if number % 2 else Storage(storage.root)
        data = str(number).encode()
        start.wait()
        try:
            write(own, data)
        except FileExistsError:
            return None
        return data

    with ThreadPoolExecutor(16) as pool:
        return [data for data in pool.map(attempt, range(16)) if data is not None]
