"""HTTP/1.1 messages as an intermediary sees them: heads, and bodies of any framing in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

PIECE_BYTES = 64 * 2**10


@dataclass
class Head:
    """First line and headers of a message."""

    first: str
    headers: list[tuple[str, str]]

    @property
    def method(self) -> str:
        return self.first.split(" ")[0]

    @property
    def target(self) -> str:
        return self.first.split(" ")[1]

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])

    def get(self, name: str) -> str:
        """Give a header's value; "" if there is none."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def length(self) -> int | None:
        """Length of the body; None: in chunks, or to the end of the connection."""
        if self.is_chunked or not self.get("content-length"):
            return None
        return int(self.get("content-length"))

    @property
    def is_chunked(self) -> bool:
        return self.get("transfer-encoding").lower() == "chunked"

    def encode(self) -> bytes:
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def without(self, *names: str) -> Head:
        return Head(self.first, [pair for pair in self.headers if pair[0].lower() not in names])


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Read to the empty line; None at the end of the connection."""
    try:
        data = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = data[:-4].decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return Head(first, [(name, value.strip()) for name, _, value in pairs])


def ends_by_close(head: Head) -> bool:
    is_answer = head.first.startswith("HTTP/")
    no_body = is_answer and (head.status in (204, 304) or head.status < 200)
    return is_answer and head.length is None and not head.is_chunked and not no_body


async def read_body(
    reader: asyncio.StreamReader, head: Head, *, is_head: bool = False
) -> AsyncIterator[bytes]:
    """Give a message's body in pieces, whatever its framing."""
    if is_head:
        return
    if head.is_chunked:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            async for piece in _read_pieces(reader, size):
                yield piece
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
    elif head.length is not None:
        async for piece in _read_pieces(reader, head.length):
            yield piece
    elif ends_by_close(head):
        while piece := await reader.read(PIECE_BYTES):
            yield piece


async def _read_pieces(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size > 0:
        piece = await reader.read(min(size, PIECE_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        yield piece


def frame(piece: bytes, head: Head) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece) if head.is_chunked else piece
