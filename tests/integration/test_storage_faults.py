"""The storage on a real S3 server behind a proxy that throttles, breaks off and loses answers."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fault_proxy import FaultKind, FaultProxy, Faults, run_fault_proxy
from support.radosgw import S3_BUCKET, Gateway

from fqgan_dist.errors import DataError
from fqgan_dist.storage import retries, s3_connection, s3_store
from fqgan_dist.storage.storage import Storage
from fqgan_dist.waiting import STORAGE_VARIABLE

MIB = 2**20
SMALL = os.urandom(50_000)
LARGE = os.urandom(MIB) * 33  # uploaded in parts


@pytest.fixture
def proxy(
    gateway: Gateway, s3_credentials: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    with run_fault_proxy(gateway.endpoint, seed=4) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return Storage(f"s3://{S3_BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}")


def read_whole(storage: Storage) -> None:
    assert storage.read_bytes("small") == SMALL


def read_many(storage: Storage) -> None:
    ranges = [("small", offset, 1000) for offset in range(0, 40_000, 1000)]
    assert b"".join(storage.read_ranges(ranges)) == SMALL[:40_000]


def stream(storage: Storage) -> None:
    with storage.open_read("small") as file:
        file.seek(100)
        assert file.read() == SMALL[100:]


def find(storage: Storage) -> None:
    assert storage.size("small") == len(SMALL)
    assert storage.exists("small")
    assert not storage.exists("none")


def list_names(storage: Storage) -> None:
    assert storage.list() == ["folder", "small"]


def walk(storage: Storage) -> None:
    assert list(storage.walk()) == [("folder/x", 1), ("small", len(SMALL))]


def replace(storage: Storage) -> None:
    storage.write_bytes("folder/x", b"2")
    assert storage.read_bytes("folder/x") == b"2"


def create(storage: Storage) -> None:
    storage.create_bytes("commit", b"winner")
    with pytest.raises(FileExistsError, match="exists already"):
        storage.create_bytes("commit", b"loser")
    assert storage.read_bytes("commit") == b"winner"


def delete(storage: Storage) -> None:
    storage.delete("folder/x")
    storage.delete("folder/x")
    assert not storage.exists("folder/x")


CALLS: list[Callable[[Storage], None]] = [
    read_whole, read_many, stream, find, list_names, walk, replace, create, delete,
]  # fmt: skip
KINDS: list[FaultKind] = [
    "slow_down", "internal", "stall", "reset", "truncate", "shorten", "lose_answer",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_call_notices_a_passing_fault(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    if kind == "stall":
        monkeypatch.setattr(s3_connection, "_READ_TIMEOUT_S", 0.5)
    storage.write_bytes("small", SMALL)
    storage.write_bytes("folder/x", b"1")
    for call in CALLS:
        proxy.script.append(kind)
        call(storage)
        proxy.script.clear()
    # Some faults can happen to reads only, others to writes only; a listing cannot be shortened.
    least = {"truncate": 8, "shorten": 5, "lose_answer": 3}.get(kind, len(CALLS))
    assert proxy.counts[kind] >= least
    if kind in ("reset", "lose_answer"):  # aiohttp itself repeats what met the end of an idle
        assert storage.num_retries <= proxy.num_faults  # connection, as it seems to it
    else:
        assert storage.num_retries == proxy.num_faults


def test_a_storm_of_faults_changes_nothing(
    proxy: FaultProxy, storage: Storage, tmp_path: Path
) -> None:
    draw = random.Random(4)
    objects = {f"{number}": draw.randbytes(draw.randrange(1, 400_000)) for number in range(40)}
    proxy.faults = Faults(
        slow_down_rate=0.05,
        internal_rate=0.02,
        reset_rate=0.05,
        truncate_rate=0.05,
        shorten_rate=0.02,
        lose_answer_rate=0.05,
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storage.write_bytes, objects, objects.values()))
        list(pool.map(storage.create_bytes, (f"new/{name}" for name in objects), objects.values()))
    ranges = [(name, start, 999) for name in objects for start in range(0, 90_000, 9_000)]
    ranges = [each for each in ranges if each[1] + each[2] <= len(objects[each[0]])]
    assert storage.read_ranges(ranges) == [objects[name][at : at + n] for name, at, n in ranges]
    assert dict(storage.walk("new")) == {name: len(data) for name, data in objects.items()}
    for name, data in objects.items():
        sha256, size = storage.download(name, tmp_path / name)
        assert (sha256, size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert set(proxy.counts) == {
        "slow_down", "internal", "reset", "truncate", "shorten", "lose_answer",
    }  # fmt: skip
    assert proxy.num_faults > 50
    assert 0 < storage.num_retries <= proxy.num_faults


def test_each_page_of_a_listing_is_repeated_alone(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_NAMES_PER_PAGE", 3)
    names = sorted(
        ["a-b", "a/x", "a/y/z", "a.b", "b", "ab", "a0", "\u00e4", "\U0001f600", "\uff5e"]
    )
    for name in names:
        storage.write_bytes(name, name.encode())
    proxy.reset_counters()
    proxy.script.extend([None, "slow_down", None, "truncate"])
    listed = list(storage.walk())
    assert listed == [(name, len(name.encode())) for name in sorted(names, key=str.encode)]
    assert proxy.num_requests == 4 + 2
    assert list(storage.walk("a")) == [("x", 3), ("y/z", 5)]
    assert list(storage.walk("none")) == []
    with pytest.raises(DataError, match="the bucket does not exist"):
        list(Storage("s3://no-such-bucket").walk())


def test_a_lost_completion_of_an_upload_is_recognised(
    proxy: FaultProxy, storage: Storage, tmp_path: Path
) -> None:
    proxy.faults = Faults(only=r"^POST .*uploadId=")
    proxy.script.append("lose_answer")
    storage.write_bytes("large", LARGE)
    source = tmp_path / "source"
    source.write_bytes(LARGE[::-1])
    proxy.script.append("lose_answer")
    storage.write_file("file", source)
    assert proxy.counts == {"lose_answer": 2}
    proxy.faults = Faults()
    assert storage.read_bytes("large") == LARGE
    assert storage.download("file", tmp_path / "copy")[0] == hash_of(LARGE[::-1])


def test_only_the_part_that_failed_is_uploaded_again(proxy: FaultProxy, storage: Storage) -> None:
    proxy.faults = Faults(only=r"^PUT .*partNumber=")
    proxy.script.extend([None, "reset", "slow_down"])
    storage.write_bytes("large", LARGE)
    assert sum("partNumber" in request.target for request in proxy.requests) == 5 + 2
    assert proxy.bytes_up < len(LARGE) + 9 * MIB


def test_an_upload_that_fails_is_given_up_at_the_server(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, "2")
    proxy.faults = Faults(only=r"^PUT .*partNumber=3", slow_down_rate=1)
    with pytest.raises(DataError, match=r"attempts in 2 s failed, the last by 503 SlowDown"):
        storage.write_bytes("large", LARGE)
    assert proxy.requests[-1].method == "DELETE"
    assert not storage.exists("large")


def test_a_download_goes_on_where_it_broke_off(
    proxy: FaultProxy, storage: Storage, tmp_path: Path
) -> None:
    storage.write_bytes("large", LARGE)
    proxy.reset_counters()
    proxy.faults = Faults(reset_rate=1, reset_after_bytes=3 * MIB)
    came: list[int] = []
    sha256, size = storage.download("large", tmp_path / "copy", progress=came.append)
    assert (sha256, size) == (hash_of(LARGE), len(LARGE))
    assert sum(came) == len(LARGE)
    # A part of 8 MiB takes three tries. A reset also drops what lies in the client's buffers, which
    # is more on a loaded machine; begun anew each time, no part would ever come to its end.
    assert proxy.counts["reset"] >= 4 * 2
    assert proxy.bytes_down < 2 * len(LARGE)


def test_wrong_bytes_show_in_the_hash(proxy: FaultProxy, storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("small", SMALL)
    proxy.script.extend([None, "corrupt"])  # the first request asks for the size
    assert storage.download("small", tmp_path / "copy")[0] != hash_of(SMALL)
    assert proxy.counts == {"corrupt": 1}


@pytest.mark.parametrize(
    ("call", "num_connections"), [("download", 4), ("read_bytes", 4), ("read_ranges", 32)]
)
def test_connections_share_the_work_of_one_that_limits(
    proxy: FaultProxy, storage: Storage, tmp_path: Path, call: str, num_connections: int
) -> None:
    data = LARGE[: 32 * MIB]
    storage.write_bytes("large", data)
    ranges = [("large", start, MIB) for start in range(0, len(data), MIB)]
    proxy.faults = Faults(bytes_per_s=4 * MIB * 4 / num_connections)
    proxy.reset_counters()
    match call:
        case "download":
            assert storage.download("large", tmp_path / "copy") == (hash_of(data), len(data))
        case "read_bytes":
            assert storage.read_bytes("large") == data
        case _:
            assert b"".join(storage.read_ranges(ranges)) == data
    # How long it takes is what the busiest connection sends, if all send at the same time. (Wall
    # time itself is measured by benchmarks/data.py: here other processes share the machine.)
    assert proxy.max_answering == num_connections
    busiest = max(proxy.bytes_down_of.values())
    assert len(data) / (num_connections * busiest) >= 0.9
    # Each connection has one or two answers to wait for, so first-byte latency hardly counts.
    assert proxy.num_requests <= num_connections + 1


def test_a_stream_is_read_ahead_by_several_connections(proxy: FaultProxy, storage: Storage) -> None:
    storage.write_bytes("large", LARGE)
    proxy.faults = Faults(bytes_per_s=8 * MIB)
    proxy.reset_counters()
    with storage.open_read("large") as file:
        assert file.read(MIB) == LARGE[:MIB]
        assert proxy.max_answering == 1
        assert file.read() == LARGE[MIB:]
    assert proxy.max_answering == 4
    assert max(proxy.bytes_down_of.values()) < 0.4 * len(LARGE)


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
