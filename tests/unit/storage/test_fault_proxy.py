"""The fault proxy does what it says; else the tests behind it would prove nothing."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator

import pytest
from support.fault_proxy import FaultKind, FaultProxy, Faults, run_fault_proxy
from support.small_s3 import ErrorAnswer, SmallS3, run_small_s3

DATA = bytes(range(256)) * 400


@pytest.fixture
def server() -> Iterator[SmallS3]:
    with run_small_s3() as server:
        server.objects["/bucket/x"] = DATA
        yield server


@pytest.fixture
def proxy(server: SmallS3) -> Iterator[FaultProxy]:
    with run_fault_proxy(server.endpoint, seed=1) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    client = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"), timeout=5)
    yield client
    client.close()


def get(client: http.client.HTTPConnection, **headers: str) -> tuple[int, bytes]:
    client.request("GET", "/bucket/x", headers=headers)
    answer = client.getresponse()
    return answer.status, answer.read()


def test_without_faults_all_passes(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: SmallS3
) -> None:
    assert get(client) == (200, DATA)
    assert get(client, Range="bytes=3-5") == (206, DATA[3:6])
    client.request("PUT", "/bucket/y", body=DATA)
    assert client.getresponse().read() == b""
    assert server.objects["/bucket/y"] == DATA
    client.request("PUT", "/bucket/z", body=b"12", headers={"Expect": "100-continue"})
    assert client.getresponse().read() == b""
    server.error = ErrorAnswer(403, "AccessDenied")
    assert get(client)[0] == 403
    assert proxy.num_connections == 1
    assert [request.method for request in proxy.requests] == ["GET", "GET", "PUT", "PUT", "GET"]
    assert proxy.requests[1].range == "bytes=3-5"
    assert proxy.bytes_up == len(DATA) + 2
    assert proxy.bytes_down > len(DATA) + 3
    assert proxy.num_faults == 0


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [("slow_down", 503, b"SlowDown"), ("internal", 500, b"InternalError")],
)
def test_refusals_never_reach_the_server(
    proxy: FaultProxy,
    client: http.client.HTTPConnection,
    server: SmallS3,
    fault: FaultKind,
    status: int,
    code: bytes,
) -> None:
    proxy.script.append(fault)
    client.request("PUT", "/bucket/y", body=DATA)
    answer = client.getresponse()
    assert answer.status == status
    assert code in answer.read()
    assert "/bucket/y" not in server.objects
    assert get(client) == (200, DATA)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("reset", ConnectionResetError), ("truncate", http.client.IncompleteRead)],
)
def test_a_body_breaks_off(
    proxy: FaultProxy, client: http.client.HTTPConnection, fault: FaultKind, error: type[Exception]
) -> None:
    proxy.faults = Faults(reset_after_bytes=1000)
    proxy.script.append(fault)
    with pytest.raises(error):
        get(client)
    assert proxy.bytes_down == 1000
    assert proxy.counts == {fault: 1}


def test_a_shortened_body_looks_whole(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    proxy.faults = Faults(reset_after_bytes=1000)
    proxy.script.append("shorten")
    assert get(client) == (200, DATA[:1000])
    assert get(client) == (200, DATA)


def test_one_bit_is_flipped(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.script.append("corrupt")
    _, body = get(client)
    flipped = [a ^ b for a, b in zip(body, DATA, strict=True) if a != b]
    assert len(flipped) == 1
    assert flipped[0].bit_count() == 1


def test_a_request_breaks_off_before_the_server_has_it(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: SmallS3
) -> None:
    proxy.script.append("reset")

    def put() -> None:
        client.request("PUT", "/bucket/y", body=DATA)
        client.getresponse()

    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        put()
    assert "/bucket/y" not in server.objects


def test_a_lost_answer_was_a_success(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: SmallS3
) -> None:
    proxy.script.append("lose_answer")
    assert get(client) == (200, DATA)  # waits for a request that it can happen to
    client.request("PUT", "/bucket/y", body=DATA)
    with pytest.raises(ConnectionError):
        client.getresponse()
    assert server.objects["/bucket/y"] == DATA
    assert proxy.counts == {"lose_answer": 1}


def test_a_stalled_request_gets_no_answer(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    proxy.script.append("stall")
    client.timeout = 0.2
    with pytest.raises(TimeoutError):
        get(client)


def test_bandwidth_and_latency_are_limited(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    proxy.faults = Faults(bytes_per_s=len(DATA) * 4, first_byte_s=0.1)
    start = time.monotonic()
    assert get(client) == (200, DATA)
    assert time.monotonic() - start >= 0.33  # 0.35, less the resolution of the loop's clock


def test_faults_depend_on_seed_and_request_alone(
    server: SmallS3, client: http.client.HTTPConnection
) -> None:
    def meet(seed: int, ranges: list[int]) -> dict[tuple[str, int], str | None]:
        faults = Faults(slow_down_rate=0.3, internal_rate=0.2)
        with run_fault_proxy(server.endpoint, seed=seed, faults=faults) as proxy:
            client = http.client.HTTPConnection(proxy.endpoint.removeprefix("http://"))
            for start in ranges:
                get(client, Range=f"bytes={start}-{start + 9}")
            client.close()
            seen = [request.range for request in proxy.requests]
            return {
                (request.range, seen[:i].count(request.range)): request.fault
                for i, request in enumerate(proxy.requests)
            }

    ranges = [10 * (i % 20) for i in range(60)]
    first = meet(1, ranges)
    assert meet(1, ranges[::-1]) == first
    assert meet(2, ranges) != first
    counts = [list(first.values()).count(kind) for kind in ("slow_down", "internal", None)]
    assert all(count > 0 for count in counts)


def test_other_requests_meet_no_fault(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    proxy.faults = Faults(slow_down_rate=1, only=r"^PUT ")
    assert get(client) == (200, DATA)
    client.request("PUT", "/bucket/y", body=DATA)
    assert client.getresponse().status == 503
