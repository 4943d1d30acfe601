"""What the S3 storage does when the server throttles, breaks off or loses its answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import DataError

DATA = b"0123456789" * 100


@dataclass
class FaultyServer:
    """One object; each request meets the next fault, after the last one all goes well."""

    faults: list[str] = field(default_factory=list)
    stored: bytes | None = DATA
    num_requests: int = 0

    def next_fault(self) -> str:
        self.num_requests += 1
        return self.faults.pop(0) if self.faults else ""


def make_handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # clients wait for "100 Continue" before a body

        def log_message(self, format: str, *args: object) -> None:
            """Be silent."""

        def answer(self, status: int, body: bytes = b"", *, size: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if size is None else size))
            self.send_header("ETag", '"1"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.close_connection = True

        def do_GET(self) -> None:
            fault = server.next_fault()
            if fault == "throttle":
                self.answer(503, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
            elif fault == "internal":
                self.answer(500, b"<Error><Code>InternalError</Code><Message>?</Message></Error>")
            elif fault == "truncate":
                self.answer(206, DATA[:300], size=500)
            elif fault == "cut":
                self.connection.close()
                self.close_connection = True
            elif server.stored is None:
                self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>")
            else:
                self.answer(206, server.stored[:500])

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            fault = server.next_fault()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if "If-None-Match" in self.headers and server.stored is not None:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            server.stored = body
            if fault == "lose answer":
                self.connection.close()
                self.close_connection = True
            else:
                self.answer(200)

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    server = FaultyServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), make_handler(server)) as http_server:
        http_server.handle_error = lambda *_: None  # type: ignore[method-assign]  # cut connections
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{http_server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
        http_server.shutdown()
        thread.join()


@pytest.mark.parametrize("fault", ["throttle", "internal", "truncate", "cut"])
@pytest.mark.parametrize("many", [False, True])
def test_passing_fault_is_not_noticed(server: FaultyServer, fault: str, many: bool) -> None:
    server.faults = [fault]
    storage = Storage("s3://bucket/run")
    if many:
        assert storage.read_ranges([("x", 0, 500)]) == [DATA[:500]]
    else:
        assert storage.read_bytes("x", length=500) == DATA[:500]
    assert server.num_requests == 2


def test_lasting_fault_ends_in_a_clear_error(server: FaultyServer) -> None:
    server.faults = ["truncate"] * 1000
    with pytest.raises(DataError, match=r"s3://bucket/run/x: cannot be read or written"):
        Storage("s3://bucket/run").read_bytes("x", length=500)
    assert server.num_requests < 100


def test_create_whose_answer_was_lost_has_succeeded(server: FaultyServer) -> None:
    server.stored, server.faults = None, ["lose answer"]
    Storage("s3://bucket/run").create_bytes("commit", DATA[:500])
    assert server.stored == DATA[:500]


def test_create_that_lost_the_race_fails_though_its_answer_was_lost(server: FaultyServer) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        Storage("s3://bucket/run").create_bytes("commit", b"mine")
    assert server.stored == DATA
