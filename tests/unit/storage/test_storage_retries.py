"""What the S3 storage does when the server throttles, breaks off or loses its answer."""

from __future__ import annotations

import itertools
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fault_proxy import FaultKind, FaultProxy, Faults, run_fault_proxy
from support.small_s3 import SmallS3, run_small_s3, set_credentials
from support.waiting import wait_until

from fqgan_dist import waiting
from fqgan_dist.errors import DataError, StorageOutageError
from fqgan_dist.storage import retries, s3_connection
from fqgan_dist.storage.storage import Storage
from fqgan_dist.waiting import STORAGE_VARIABLE, WAITS

DATA = bytes(range(256)) * 4
READ_FAULTS: list[FaultKind] = [
    "slow_down", "internal", "stall", "reset", "truncate", "shorten",
]  # fmt: skip


@pytest.fixture
def server() -> Iterator[SmallS3]:
    with run_small_s3() as server:
        server.objects["/bucket/run/x"] = DATA
        yield server


@pytest.fixture
def proxy(server: SmallS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3_connection, "_READ_TIMEOUT_S", 0.5)  # for the stalled connections
    with run_fault_proxy(server.endpoint) as proxy:
        set_credentials(monkeypatch, proxy.endpoint)
        yield proxy


@pytest.fixture
def storage() -> Storage:
    return Storage("s3://bucket/run")


@pytest.mark.parametrize("fault", READ_FAULTS)
@pytest.mark.parametrize("many", [False, True])
def test_passing_fault_is_not_noticed(
    proxy: FaultProxy, storage: Storage, fault: FaultKind, many: bool
) -> None:
    proxy.script.append(fault)
    if many:
        assert storage.read_ranges([("x", 5, 500)]) == [DATA[5:505]]
    else:
        assert storage.read_bytes("x", offset=5, length=500) == DATA[5:505]
    assert proxy.counts == {fault: 1}
    assert proxy.num_requests == 2
    assert storage.num_retries == 1


def test_a_read_goes_on_where_it_broke_off(proxy: FaultProxy, storage: Storage) -> None:
    proxy.faults = Faults(reset_after_bytes=300)
    proxy.script.append("truncate")
    assert storage.read_bytes("x", length=1000) == DATA[:1000]
    assert [request.range for request in proxy.requests] == ["bytes=0-999", "bytes=300-999"]


def test_a_long_body_may_break_off_more_often_than_a_request(
    proxy: FaultProxy, storage: Storage, server: SmallS3
) -> None:
    server.objects["/bucket/run/long"] = DATA * 1024  # 1 MiB, in 11 pieces
    proxy.faults = Faults(reset_rate=1, reset_after_bytes=100_000)
    assert storage.read_bytes("long") == DATA * 1024
    assert storage.num_retries >= 10


def test_only_the_ranges_that_failed_are_read_again(proxy: FaultProxy, storage: Storage) -> None:
    proxy.script.extend(["slow_down", "truncate", None, "shorten"])
    ranges = [("x", offset, 10) for offset in range(0, 400, 10)]
    assert storage.read_ranges(ranges) == [DATA[offset : offset + 10] for _, offset, _ in ranges]
    assert proxy.num_requests == 40 + 3
    assert storage.num_retries == 3


def test_an_empty_range_needs_no_request(proxy: FaultProxy, storage: Storage) -> None:
    assert storage.read_ranges([("x", 3, 0), ("x", 3, 1)]) == [b"", DATA[3:4]]
    assert proxy.num_requests == 1
    with pytest.raises(ValueError, match="must not be negative"):
        storage.read_ranges([("x", -1, 1)])


def test_connections_are_used_again(proxy: FaultProxy, storage: Storage) -> None:
    for offset in range(30):
        storage.read_bytes("x", offset=offset, length=100)
    assert proxy.num_requests == 30
    assert proxy.num_connections == 1


@pytest.mark.parametrize(
    ("fault", "last"),
    [
        ("slow_down", "503 SlowDown"),
        ("internal", "500 InternalError"),
        ("truncate", r"\w+Error"),
        ("shorten", "fewer bytes came than were asked for"),
    ],
)
def test_lasting_fault_ends_in_a_clear_error_when_patience_ends(
    proxy: FaultProxy,
    storage: Storage,
    fault: FaultKind,
    last: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, "1")
    proxy.faults = Faults(reset_after_bytes=0)
    proxy.script.extend(itertools.repeat(fault, 1000))
    message = (
        r"s3://bucket/run/x: cannot be read or written: \d+ attempts in 1 s failed, "
        rf"the last by {last}"
    )
    with pytest.raises(StorageOutageError, match=message):
        storage.read_bytes("x", length=500)
    assert proxy.num_requests > 3
    assert 0.5 < storage.waited_s < 20


def test_what_counts_is_time_not_tries(
    server: SmallS3, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that refuses at once for a while is waited for like one that does not answer."""
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "_LONGEST_WAIT_S", 0.02)
    monkeypatch.setenv(STORAGE_VARIABLE, "30")
    with run_fault_proxy(server.endpoint) as proxy:
        set_credentials(monkeypatch, proxy.endpoint)
        proxy.script.extend(itertools.repeat("slow_down", 60))
        assert storage.read_bytes("x") == DATA
        assert proxy.num_requests == 61


def test_a_wait_is_shown_while_it_lasts(
    proxy: FaultProxy, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "WORTH_A_WORD_S", 0.0)
    proxy.faults = Faults(slow_down_rate=1)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(storage.read_bytes, "x")
        wait_until(lambda: "503 SlowDown" in str(WAITS.longest()))
        assert str(WAITS.longest()).startswith("waiting since ")
        proxy.faults = Faults()
        assert reading.result(30) == DATA
    assert WAITS.longest() is None


def test_retries_are_logged_once_not_each(
    proxy: FaultProxy,
    storage: Storage,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, "1")
    proxy.faults = Faults(slow_down_rate=1)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError):
        storage.read_bytes("x")
    assert storage.num_retries > 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "requests repeated: 1 since" in line
    assert line.endswith("503 SlowDown")


def test_children_count_with_their_parent(proxy: FaultProxy) -> None:
    parent = Storage("s3://bucket")
    proxy.script.append("slow_down")
    assert parent.child("run").read_bytes("x") == DATA
    assert parent.num_retries == 1
    assert proxy.num_connections == 1


def test_large_objects_come_in_parallel_parts(
    proxy: FaultProxy, storage: Storage, server: SmallS3, tmp_path: Path
) -> None:
    data = DATA * (20 * 1024 + 1)  # 20 MiB and a little
    server.objects["/bucket/run/large"] = data
    proxy.script.extend([None, "truncate", "reset"])
    assert storage.read_bytes("large") == data
    assert storage.read_bytes("large", offset=5, length=2**24) == data[5 : 5 + 2**24]
    assert proxy.max_open == 3
    assert proxy.num_requests == 3 + 2 + 2
    with storage.open_read("large") as stream:
        assert stream.read(10) == data[:10]
        stream.seek(-7, 2)
        assert stream.read() == data[-7:]
        stream.seek(2**20 - 3)
        assert stream.read() == data[2**20 - 3 :]
    assert storage.download("large", tmp_path / "copy")[1] == len(data)
    assert (tmp_path / "copy").read_bytes() == data


def test_a_stream_goes_on_after_faults(
    proxy: FaultProxy, storage: Storage, server: SmallS3
) -> None:
    data = DATA * 5000
    server.objects["/bucket/run/large"] = data
    proxy.faults = Faults(truncate_rate=0.3, slow_down_rate=0.3)
    with storage.open_read("large") as stream:
        assert b"".join(iter(lambda: stream.read(100_000), b"")) == data
    assert storage.num_retries == proxy.num_faults > 0


def test_a_replaced_object_is_never_read_in_part(
    proxy: FaultProxy, storage: Storage, server: SmallS3
) -> None:
    size = 9 * 2**20  # two parts
    server.objects["/bucket/run/large"] = b"0" * size
    stop = threading.Event()

    def replace() -> None:
        version = 0
        while not stop.wait(0.05):
            version += 1
            server.objects["/bucket/run/large"] = str(version % 10).encode() * size

    with storage.open_read("large") as stream:
        assert stream.read(1) == b"0"
        server.objects["/bucket/run/large"] = b"1" * size
        with pytest.raises(DataError, match=r"large: was replaced while it was read"):
            stream.read()
    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(5):
            try:
                data = storage.read_bytes("large")
            except DataError as error:
                assert "was replaced" in str(error)  # noqa: PT017 (either outcome is right)
            else:
                assert data == data[:1] * size
    finally:
        stop.set()
        writer.join()


@pytest.mark.parametrize("fault", ["slow_down", "internal", "stall", "reset", "lose_answer"])
def test_writes_are_repeated(
    proxy: FaultProxy, storage: Storage, server: SmallS3, fault: FaultKind
) -> None:
    proxy.script.append(fault)
    storage.write_bytes("new", b"1")
    proxy.script.append(fault)
    storage.create_bytes("commit", b"2")
    assert server.objects["/bucket/run/new"] == b"1"
    assert server.objects["/bucket/run/commit"] == b"2"
    proxy.script.append(fault)
    storage.delete("new")
    assert "/bucket/run/new" not in server.objects
    assert proxy.counts == {fault: 3}


def test_create_that_lost_the_race_fails_though_its_answer_was_lost(
    proxy: FaultProxy, storage: Storage, server: SmallS3
) -> None:
    proxy.script.extend(["reset", "slow_down"])
    with pytest.raises(FileExistsError, match="exists already"):
        storage.create_bytes("x", b"mine")
    assert server.objects["/bucket/run/x"] == DATA


def test_a_server_that_is_not_there_is_said_soon(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has never found it, and is of no run that has, takes it for a mistake."""
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "_FIRST_CONTACT_S", 0.1)
    set_credentials(monkeypatch, "http://127.0.0.1:9")
    message = r"EndpointConnectionError; \d+ attempts in 0 s\).*AWS_ENDPOINT_URL"
    with pytest.raises(StorageOutageError, match=message):
        storage.read_bytes("x")


@pytest.mark.parametrize("is_known", ["it has answered before", "the run has found it"])
def test_a_server_that_goes_away_for_a_while_is_waited_for(
    server: SmallS3, storage: Storage, monkeypatch: pytest.MonkeyPatch, is_known: str
) -> None:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retries, "_FIRST_CONTACT_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    set_credentials(monkeypatch, f"http://127.0.0.1:{port}")
    if is_known == "the run has found it":
        monkeypatch.setenv(STORAGE_VARIABLE, "60")
    else:
        with run_fault_proxy(server.endpoint, port=port):
            assert storage.read_bytes("x") == DATA
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(storage.read_bytes, "x")
        wait_until(lambda: storage.num_retries > 5)
        with run_fault_proxy(server.endpoint, port=port):
            assert reading.result(30) == DATA
