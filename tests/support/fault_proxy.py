"""A proxy between an S3 client and its server that throttles, breaks, spoils and loses answers.

    with run_fault_proxy(gateway.endpoint, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.faults = Faults(slow_down_rate=0.05, reset_rate=0.05)
        ...
        assert proxy.counts["reset"] > 0

It forwards every header, `Host` too, as it came, so that signatures hold. It serves from a thread
of the caller's process; clients may be anywhere on the machine. Which request meets which fault is
a pure function of the seed, the request (method, target, range) and how often that very request
came before: not of the order in which concurrent requests arrive.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, NoReturn
from urllib.parse import urlsplit

from support.http_messages import PIECE_BYTES, Head, ends_by_close, frame, read_body, read_head

FaultKind = Literal[
    "slow_down",  # 503 SlowDown; the server never sees the request
    "internal",  # 500 InternalError; the server never sees the request
    "stall",  # no answer comes, until the client gives up; the server never sees the request
    "reset",  # the connection is reset within a body, that of the request if there is one
    "truncate",  # the connection ends within the answer's body, before the length announced
    "shorten",  # a whole and consistent answer with fewer bytes than were asked for
    "corrupt",  # a bit of the body of a GET of an object is flipped
    "lose_answer",  # the server did what a PUT, POST or DELETE asked for; the client sees a reset
]

_ERRORS = {
    "slow_down": ("503 Slow Down", "SlowDown"),
    "internal": ("500 Internal Server Error", "InternalError"),
}
_METHODS = {
    "truncate": ("GET",),
    "shorten": ("GET",),
    "corrupt": ("GET",),
    "lose_answer": ("PUT", "POST", "DELETE"),
}
"""The methods that a fault can happen to; all where it is not named."""
_CHUNKED_CUT_BYTES = 256
"""Of a body whose length is not announced at most so much passes before it breaks off."""
_MAX_LAG_S = 1.0
"""Within a body a throttled connection makes up for as much lateness of this busy process."""


@dataclass(frozen=True)
class Faults:
    """What happens to requests; rates are probabilities of a request and sum to at most 1."""

    bytes_per_s: float | None = None
    """Bandwidth of each connection and direction; None: not limited."""
    first_byte_s: float = 0.0
    """Delay of every answer."""
    slow_down_rate: float = 0.0
    internal_rate: float = 0.0
    stall_rate: float = 0.0
    reset_rate: float = 0.0
    reset_after_bytes: int | None = None
    """Body bytes that pass before a reset, or are left of a truncated or shortened body; a body
    that is no longer passes whole. None: drawn."""
    truncate_rate: float = 0.0
    shorten_rate: float = 0.0
    corrupt_rate: float = 0.0
    lose_answer_rate: float = 0.0
    only: str = ""
    """Regular expression, searched in "METHOD /bucket/key?query"; other requests meet no fault."""

    def applies_to(self, request: Request) -> bool:
        """Tell whether a request is one that may meet a fault."""
        return re.search(self.only, f"{request.method} {request.target}") is not None

    def draw(self, fraction: float) -> FaultKind | None:
        """Choose the fault of a request by a number in [0, 1)."""
        rates: list[tuple[FaultKind, float]] = [
            ("slow_down", self.slow_down_rate),
            ("internal", self.internal_rate),
            ("stall", self.stall_rate),
            ("reset", self.reset_rate),
            ("truncate", self.truncate_rate),
            ("shorten", self.shorten_rate),
            ("corrupt", self.corrupt_rate),
            ("lose_answer", self.lose_answer_rate),
        ]
        for kind, rate in rates:
            if fraction < rate:
                return kind
            fraction -= rate
        return None


@dataclass(frozen=True)
class Request:
    """The head of a request, and the fault drawn for it (it may not fit the answer)."""

    method: str
    target: str
    range: str
    fault: FaultKind | None = None


@dataclass
class FaultProxy:
    """A running proxy: its settings, which may change at any time, and what it has counted."""

    upstream: str
    seed: int = 0
    endpoint: str = ""
    faults: Faults = field(default_factory=Faults)
    script: deque[FaultKind | None] = field(default_factory=deque)
    """Faults (None: none) of the next requests, before any is drawn; each waits for a request that
    `faults.only` admits and whose method it can happen to."""
    requests: list[Request] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Faults that happened, by kind."""
    num_connections: int = 0
    num_open: int = 0
    max_open: int = 0
    """Most connections that were open at once."""
    bytes_up: int = 0
    bytes_down: int = 0
    """Bytes of bodies that were passed on to the server and to clients."""
    bytes_down_of: Counter[int] = field(default_factory=Counter)
    """Bytes passed on to clients, by connection (numbers in the order of opening)."""
    num_answering: int = 0
    max_answering: int = 0
    """Most answers whose bodies were under way at once."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    """Gives each connection its number."""
    _seen: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    @property
    def num_requests(self) -> int:
        """Number of requests that came."""
        return len(self.requests)

    @property
    def num_faults(self) -> int:
        """Number of faults that happened."""
        return sum(self.counts.values())

    def reset_counters(self) -> None:
        """Forget all that was counted but open connections, and not which faults were drawn."""
        self.requests.clear()
        self.counts.clear()
        self.bytes_down_of.clear()
        self.max_answering = self.num_answering
        self.num_connections = self.max_open = self.num_open
        self.bytes_up = self.bytes_down = 0

    def choose_fault(self, head: Head) -> tuple[Request, float]:
        """Decide the fault of a request, and where in the body it happens (a number in [0, 1))."""
        request = Request(head.method, head.target, head.get("range"))
        key = (request.method, request.target, request.range)
        self._seen[key] += 1
        text = repr((self.seed, key, self._seen[key]))
        first, second = struct.unpack("<QQ", hashlib.sha256(text.encode()).digest()[:16])
        fault: FaultKind | None = None
        if self.faults.applies_to(request):
            if not self.script:
                fault = self.faults.draw(first / 2**64)
            elif request.method in _METHODS.get(self.script[0] or "", (request.method,)):
                fault = self.script.popleft()
        request = Request(*key, fault)
        self.requests.append(request)
        return request, second / 2**64


class _ConnectionEndedError(Exception):
    """The client's connection was reset or ended on purpose."""


@contextmanager
def run_fault_proxy(
    upstream: str, *, seed: int = 0, faults: Faults | None = None, port: int = 0
) -> Iterator[FaultProxy]:
    """Serve on a port of loopback until the end of the block.

    Args:
        upstream: the server, such as http://127.0.0.1:7480.
        seed: chooses which requests meet a fault.
        faults: the first settings; by default all goes well.
        port: 0: any that is free.
    """
    proxy = FaultProxy(upstream, seed, faults=faults or Faults())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault-proxy", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(_start(proxy, port), loop).result()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(proxy: FaultProxy, port: int) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.num_connections += 1
        proxy.num_open += 1
        proxy.max_open = max(proxy.max_open, proxy.num_open)
        try:
            await _Connection(proxy, reader, writer).serve()
        except asyncio.CancelledError:
            pass  # the proxy stops; asyncio would report a cancelled task as an error
        finally:
            proxy.num_open -= 1

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=PIECE_BYTES)
    port = server.sockets[0].getsockname()[1]
    proxy.endpoint = f"http://127.0.0.1:{port}"
    return server


async def _stop(server: asyncio.Server) -> None:
    server.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One connection of a client, and the one to the server that serves it."""

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._number = next(proxy.numbers)
        self._reader = reader
        self._writer = writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._free_at = {"up": 0.0, "down": 0.0}

    async def serve(self) -> None:
        try:
            while (head := await read_head(self._reader)) is not None:
                await self._answer(head)
        except (_ConnectionEndedError, ConnectionError, asyncio.IncompleteReadError):
            pass  # on purpose, or the client or server went away
        finally:
            self._drop_server()
            self._writer.close()

    async def _answer(self, head: Head) -> None:
        request, place = self._proxy.choose_fault(head)
        if head.get("expect"):
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.fault in ("slow_down", "internal", "stall"):
            async for _ in read_body(self._reader, head):
                pass
            self._proxy.counts[request.fault] += 1
            if request.fault == "stall":
                await self._reader.read()  # ends when the client closes the connection
                raise _ConnectionEndedError
            await self._refuse(head, *_ERRORS[request.fault])
            return
        server_reader, server_writer = await self._connect()
        await self._forward_request(head, request, place, server_writer)
        answer = await read_head(server_reader)
        while answer is not None and answer.status == 100:
            answer = await read_head(server_reader)
        if answer is None:
            self._reset()
        await asyncio.sleep(self._proxy.faults.first_byte_s)
        await self._forward_answer(request, answer, place, server_reader)

    async def _refuse(self, head: Head, status: str, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        await asyncio.sleep(self._proxy.faults.first_byte_s)
        length = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._writer.write(Head(f"HTTP/1.1 {status}", length).encode())
        if head.method != "HEAD":
            self._writer.write(body)
        await self._writer.drain()

    async def _forward_request(
        self, head: Head, request: Request, place: float, server: asyncio.StreamWriter
    ) -> None:
        left = self._cut(head, place) if request.fault == "reset" and head.length else None
        server.write(head.without("expect").encode())
        self._start_body("up")
        async for piece in read_body(self._reader, head):
            if left is not None and len(piece) > left:
                self._proxy.counts["reset"] += 1
                self._reset()
            left = None if left is None else left - len(piece)
            await self._pace("up", len(piece))
            server.write(frame(piece, head))
            self._proxy.bytes_up += len(piece)
            await server.drain()
        if head.is_chunked:
            server.write(b"0\r\n\r\n")
        await server.drain()

    async def _forward_answer(
        self, request: Request, head: Head, place: float, server: asyncio.StreamReader
    ) -> None:
        kind = request.fault if _fits(request, head) else None
        body = read_body(server, head, is_head=request.method == "HEAD")
        has_body = bool(head.length) or head.is_chunked
        if kind == "lose_answer" or (kind == "reset" and not has_body):
            self._proxy.counts[kind] += 1
            async for _ in body:
                pass  # the server has done all that it does
            self._reset()
        cut = None
        if kind in ("reset", "truncate", "shorten"):
            cut = self._cut(head, place)
            kind = kind if cut is not None else None
        if kind is not None:
            self._proxy.counts[kind] += 1
        if kind == "shorten":
            headers = head.without("content-length").headers
            head = Head(head.first, [*headers, ("Content-Length", str(cut))])
        self._writer.write(head.encode())
        flip = int(place * (head.length or 0)) if kind == "corrupt" else None
        self._proxy.num_answering += 1
        self._proxy.max_answering = max(self._proxy.max_answering, self._proxy.num_answering)
        try:
            await self._send_body(body, head, cut, flip)
        finally:
            self._proxy.num_answering -= 1
        if kind == "reset":
            self._reset()
        if kind == "truncate" or head.get("connection").lower() == "close" or ends_by_close(head):
            self._writer.close()
            raise _ConnectionEndedError
        if kind == "shorten":
            self._drop_server()  # the rest of its answer was not read

    async def _send_body(
        self, body: AsyncIterator[bytes], head: Head, cut: int | None, flip: int | None
    ) -> None:
        sent = 0
        self._start_body("down")
        async for piece in body:
            if cut is not None and sent + len(piece) >= cut:
                piece = piece[: cut - sent]
                if not piece:
                    return
            if flip is not None and sent <= flip < sent + len(piece):
                spoiled = bytearray(piece)
                spoiled[flip - sent] ^= 1 << (flip % 8)
                piece = bytes(spoiled)
            await self._pace("down", len(piece))
            sent += len(piece)
            self._proxy.bytes_down += len(piece)  # before the client can have it and look
            self._proxy.bytes_down_of[self._number] += len(piece)
            self._writer.write(frame(piece, head))
            await self._writer.drain()
            if sent == cut:
                return
        if head.is_chunked and cut is None:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def _cut(self, head: Head, place: float) -> int | None:
        """Choose how many bytes of a body pass; None: all."""
        length = _CHUNKED_CUT_BYTES if head.is_chunked else head.length or 0
        after = self._proxy.faults.reset_after_bytes
        cut = int(place * length) if after is None else after
        return cut if cut < length else None

    def _start_body(self, direction: str) -> None:
        """Let no idle time before a body count for its bandwidth."""
        self._free_at[direction] = max(self._free_at[direction], time.monotonic())

    async def _pace(self, direction: str, count: int) -> None:
        """Wait until the bandwidth of this connection allows so many more bytes."""
        rate = self._proxy.faults.bytes_per_s
        if rate is None:
            return
        start = max(self._free_at[direction], time.monotonic() - _MAX_LAG_S)
        self._free_at[direction] = start + count / rate
        await asyncio.sleep(max(0.0, self._free_at[direction] - time.monotonic()))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._server is not None and (self._server[0].at_eof() or self._server[1].is_closing()):
            self._drop_server()
        if self._server is None:
            url = urlsplit(self._proxy.upstream)
            self._server = await asyncio.open_connection(url.hostname, url.port, limit=PIECE_BYTES)
        return self._server

    def _drop_server(self) -> None:
        if self._server is not None:
            self._server[1].close()
        self._server = None

    def _reset(self) -> NoReturn:
        """End the client's connection by RST instead of FIN."""
        raw: socket.socket = self._writer.get_extra_info("socket")
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        raise _ConnectionEndedError


def _fits(request: Request, answer: Head) -> bool:
    """Tell whether the fault drawn for a request can happen to its answer."""
    has_body = request.method != "HEAD" and (bool(answer.length) or answer.is_chunked)
    is_object = bool(answer.length) and request.method == "GET" and bool(answer.get("etag"))
    match request.fault:
        case "lose_answer":
            return request.method in ("PUT", "POST", "DELETE") and answer.status < 300
        case "corrupt" | "shorten":
            return is_object and answer.status in (200, 206)
        case "truncate":
            return has_body
        case _:
            return request.fault == "reset"
