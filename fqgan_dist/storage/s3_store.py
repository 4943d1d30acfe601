"""A bucket as an object store.

Each request is made, repeated and explained here, one by one. Left to themselves s3fs and botocore
repeat some errors and not others, a whole listing or body instead of what failed of it, each on top
of the other, and count nothing.

Sources: one connection per 85-90 MB/s and ranges of 8-16 MB, "Performance design patterns for
Amazon S3"; create-only puts, "Conditional requests", both in the Amazon S3 user guide.
"""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar, cast

from fqgan_dist.errors import DataError
from fqgan_dist.storage.async_tasks import cancel, gather, wait_for_first
from fqgan_dist.storage.download_target import TargetFile, create_target
from fqgan_dist.storage.leftovers import Swept
from fqgan_dist.storage.names import split_bucket
from fqgan_dist.storage.object_stream import ObjectStream
from fqgan_dist.storage.retries import RequestRetries
from fqgan_dist.storage.s3_connection import as_request_error, client_errors, connect
from fqgan_dist.storage.s3_errors import RequestError, explain
from fqgan_dist.storage.s3_uploads import abort_unfinished, upload

_REQUESTS_AT_ONCE = 32
# Connections for parts of large objects: they keep none of the others from small requests.
_TRANSFERS_AT_ONCE = 16
_PART_BYTES = 8 * 2**20
# Parts of a download go to disk as they come, and go on where they broke off: long ones save first-
# byte latencies (60 ms are 5 MB at 90 MB/s).
_LONGEST_PART_BYTES = 64 * 2**20
_MULTIPART_FROM_BYTES = 32 * 2**20
_PIECE_BYTES = 256 * 2**10
_DISK_WRITE_BYTES = 2**20
# A try that brought as much of a body counts as progress.
_PROGRESS_BYTES = 64 * 2**10
_READS_OF_CHANGING_OBJECT = 3
_NAMES_PER_PAGE = 1000

P = ParamSpec("P")
T = TypeVar("T")
Sink = Callable[[int, bytes], Awaitable[None]]
"""Takes a piece of an object and its offset."""


@dataclass
class _Span:
    uri: str
    position: int
    end: int
    """Where to stop; the end of the object if that comes first."""
    etag: str = ""
    """The version to read; "" for any, then the one that came."""
    total: int = 0
    """Size of the object, once an answer has come."""


class S3Backend:
    """Objects of buckets, by `s3://` URIs. Safe to use from several threads; one per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None
        self._retries = RequestRetries()
        self._requests = asyncio.Semaphore(_REQUESTS_AT_ONCE)
        self._transfers = asyncio.Semaphore(_TRANSFERS_AT_ONCE)

    @property
    def num_retries(self) -> int:
        return self._retries.num_retries

    @property
    def waited_s(self) -> float:
        return self._retries.waited_s

    def size(self, uri: str) -> int:
        return self._run(uri, self._find, uri).total

    def read(self, uri: str, offset: int, length: int | None) -> bytes:
        return self._run(uri, self._read, uri, offset, length)

    def read_many(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        return self._run("", self._read_all, uris, ranges)

    def open_read(self, uri: str) -> BinaryIO:
        span = self._run(uri, self._find, uri)

        def read_range(offset: int, size: int) -> Future[bytes]:
            return self._submit(uri, self._read_version, uri, offset, size, span.etag)

        stream = io.BufferedReader(ObjectStream(read_range, span.total), _PIECE_BYTES)
        return cast(BinaryIO, stream)

    def download(
        self, uri: str, target: Path, progress: Callable[[int], None] | None
    ) -> tuple[str, int]:
        span = self._run(uri, self._find, uri)
        with create_target(target, span.total) as file:
            self._run(uri, self._download, span, file, progress)
            return file.sha256, span.total

    def write(self, uri: str, data: bytes | memoryview) -> None:
        if len(data) < _MULTIPART_FROM_BYTES:
            self._run(uri, self._call, "put_object", uri, Body=bytes(data))
        else:
            view = memoryview(data)
            self._run(uri, self._upload, uri, len(data), lambda start, end: bytes(view[start:end]))

    def write_file(self, uri: str, source: Path) -> None:
        size = source.stat().st_size
        if size < _MULTIPART_FROM_BYTES:
            self.write(uri, source.read_bytes())
        else:
            self._run(
                uri, self._upload, uri, size, lambda start, end: _read_part(source, start, end)
            )

    def create(self, uri: str, data: bytes) -> None:
        self._run(uri, self._create, uri, data)

    def replace(self, uri: str, former: bytes, data: bytes) -> None:
        self._run(uri, self._replace, uri, former, data)

    def names(self, uri: str) -> list[str]:
        bucket, prefix = _split_folder(uri)
        pages = self._pages(uri, Bucket=bucket, Prefix=prefix, Delimiter="/")
        names = [
            entry.get("Prefix", entry.get("Key", "")).removeprefix(prefix).rstrip("/")
            for page in pages
            for entry in (*page.get("CommonPrefixes", ()), *page.get("Contents", ()))
        ]
        return [name for name in names if name]  # an empty name is a console's folder marker

    def walk(self, uri: str) -> Iterator[tuple[str, int]]:
        bucket, prefix = _split_folder(uri)
        last = b""
        for page in self._pages(uri, Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(prefix)
                if not name or name.endswith("/"):
                    continue  # a console's folder marker
                if (key := name.encode()) <= last:
                    raise DataError(
                        f"{uri}: the store lists {name!r} out of order; expected the names sorted "
                        "by their bytes; use a general purpose bucket"
                    )
                last = key
                yield name, int(entry["Size"])

    def delete(self, uri: str) -> None:
        self._run(uri, self._call, "delete_object", uri)

    def sweep(self, uri: str, *, is_superseded: bool) -> Swept:
        return self._run(uri, self._sweep, uri, is_superseded)

    # Reading

    async def _find(self, uri: str) -> _Span:
        # By a GET of one byte: the error answers of a HEAD have no body that says what is wrong.
        span = _Span(uri, 0, 1)
        try:
            await self._fetch(span, _drop, self._requests)
        except RequestError as error:
            if not error.is_beyond_end:  # an empty object has no first byte
                raise
        return span

    async def _read_all(self, uris: list[str], ranges: list[tuple[int, int]]) -> list[bytes]:
        return await gather(
            [
                self._named(uri, self._read, uri, start, size)
                for uri, (start, size) in zip(uris, ranges, strict=True)
            ]
        )

    async def _read(self, uri: str, offset: int, length: int | None) -> bytes:
        if length == 0:
            return b""  # no Range header can say that
        for left in reversed(range(_READS_OF_CHANGING_OBJECT)):
            try:
                return await self._read_version(uri, offset, length, "")
            except RequestError as error:
                if error.is_beyond_end:
                    return b""
                if not (error.is_precondition and left):  # else it was replaced: read the new one
                    raise
        raise AssertionError("the last read returns or raises")

    async def _read_version(self, uri: str, offset: int, length: int | None, etag: str) -> bytes:
        """Read one version of an object; the answer for its first part says how large it is."""
        wanted = _PART_BYTES if length is None else min(length, _PART_BYTES)
        first = _Span(uri, offset, offset + wanted, etag)
        pieces: dict[int, bytes] = {}

        async def keep(position: int, piece: bytes) -> None:
            pieces[position] = piece

        if length == wanted:
            await self._fetch(first, keep, self._requests)
        else:
            answered = asyncio.Event()
            head = asyncio.create_task(self._fetch(first, keep, self._requests, answered))
            await wait_for_first(head, answered)
            end = first.total if length is None else min(first.total, offset + length)
            rest = [
                self._fetch(_Span(uri, start, stop, first.etag), keep, self._transfers)
                for start, stop in _split(offset + wanted, end, _PART_BYTES)
            ]
            await gather([head, *rest])
        return b"".join(pieces[position] for position in sorted(pieces))

    async def _fetch(
        self,
        span: _Span,
        sink: Sink,
        permits: asyncio.Semaphore,
        answered: asyncio.Event | None = None,
    ) -> None:
        """Read a range; after an error go on from where it broke off.

        `answered` is set as soon as `span` holds the object's size and version.
        """
        start = span.position

        async def read_on() -> None:
            async with permits, aclosing(self._pieces(span, answered)) as pieces:
                async for piece in pieces:
                    await sink(span.position, piece)
                    span.position += len(piece)

        def progress() -> int:
            return (span.position - start) // _PROGRESS_BYTES

        await self._retries.run(read_on, progress=progress)

    async def _pieces(
        self, span: _Span, answered: asyncio.Event | None
    ) -> AsyncGenerator[bytes, None]:
        """Make one request for the rest of a range; the taker of the pieces moves its position."""
        bucket, key = split_bucket(span.uri)
        version = {"IfMatch": span.etag} if span.etag else {}
        byte_range = f"bytes={span.position}-{span.end - 1}"
        try:
            # The methods of s3fs for use within its event loop have an underscore.
            answer = await self._filesystem._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=byte_range, **version
            )
            start, span.total = _parse_range(answer)
            if start != span.position:
                raise RequestError("broken", f"bytes from {start}, not {span.position}")
            span.etag = answer["ETag"]
            span.end = min(span.end, span.total)
            if answered is not None:
                answered.set()
            async with answer["Body"] as body:
                while span.position < span.end:
                    piece = await body.read(min(_PIECE_BYTES, span.end - span.position))
                    if not piece:  # the body ended as announced, but short of the range
                        raise RequestError("broken", "fewer bytes came than were asked for")
                    yield piece
        except client_errors() as error:
            raise as_request_error(error) from error

    async def _download(
        self, span: _Span, file: TargetFile, progress: Callable[[int], None] | None
    ) -> None:
        parts = _split(0, span.total, _part_bytes(span.total))

        async def fetch(start: int, end: int) -> None:
            waiting = bytearray()

            async def keep(position: int, piece: bytes) -> None:
                waiting.extend(piece)
                if progress is not None:
                    progress(len(piece))
                position += len(piece)
                if len(waiting) >= _DISK_WRITE_BYTES or position == end:
                    # Copied: the thread may outlive a cancelled task.
                    data = bytes(waiting)
                    waiting.clear()
                    await asyncio.to_thread(file.write, position - len(data), data)

            part = _Span(span.uri, start, end, span.etag)
            await self._fetch(part, keep, self._transfers)

        tasks = [asyncio.create_task(fetch(start, end)) for start, end in parts]
        try:
            for task, (start, end) in zip(tasks, parts, strict=True):
                await task
                await asyncio.to_thread(file.hash, start, end - start)
        finally:
            await cancel(tasks)

    # Writing and listing

    async def _call(self, method: str, uri: str, **parameters: Any) -> Any:
        bucket, key = split_bucket(uri)
        return await self._request(method, Bucket=bucket, Key=key, **parameters)

    async def _request(self, method: str, **parameters: Any) -> Any:
        async def request() -> Any:
            async with self._requests:
                try:
                    return await self._filesystem._call_s3(method, **parameters)
                except client_errors() as error:
                    raise as_request_error(error) from error

        return await self._retries.run(request)

    async def _create(self, uri: str, data: bytes) -> None:
        # One request, however large: Ceph 16 ignores If-None-Match where a multipart upload is
        # completed, and overwrites (measured).
        try:
            await self._call("put_object", uri, Body=data, IfNoneMatch="*")
        except RequestError as error:
            if error.is_precondition:
                raise FileExistsError(uri) from error
            raise

    async def _replace(self, uri: str, former: bytes, data: bytes) -> None:
        found = await self._find(uri)
        if found.total != len(former) or await self._read_known(uri, found) != former:
            raise FileExistsError(uri)
        # Ceph 16 compares with the bare value (measured), where S3 has it in quotes.
        for etag in (found.etag, found.etag.strip('"')):
            try:
                await self._call("put_object", uri, Body=data, IfMatch=etag)
                return
            except RequestError as error:
                if not error.is_precondition:
                    raise
            if (await self._find(uri)).etag != found.etag:
                raise FileExistsError(uri)
        # A store that knows no such condition refuses whatever is asked: it was unchanged just now.
        await self._call("put_object", uri, Body=data)

    async def _read_known(self, uri: str, found: _Span) -> bytes:
        if found.total == 0:
            return b""  # no Range header can say that
        try:
            return await self._read_version(uri, 0, found.total, found.etag)
        except RequestError as error:
            if error.is_precondition:
                raise FileExistsError(uri) from error
            raise

    async def _upload(self, uri: str, size: int, part_of: Callable[[int, int], bytes]) -> None:
        def call(method: str, **parameters: Any) -> Awaitable[Any]:
            return self._call(method, uri, **parameters)

        await upload(call, size, part_of, part_bytes=_PART_BYTES, transfers=self._transfers)

    async def _sweep(self, uri: str, is_superseded: bool) -> Swept:
        bucket, prefix = _split_folder(uri)
        return await abort_unfinished(self._request, bucket, prefix, is_superseded=is_superseded)

    def _pages(self, uri: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        # Page by page: one that fails is repeated, not the pages before it.
        parameters["MaxKeys"] = _NAMES_PER_PAGE
        while True:
            page = self._run(uri, self._request, "list_objects_v2", **parameters)
            yield page
            if not page.get("IsTruncated"):
                return
            parameters["ContinuationToken"] = page["NextContinuationToken"]

    # The event loop

    @property
    def _filesystem(self) -> Any:
        # Not in the constructor: naming a root asks for no credentials, and imports no client.
        with self._lock:
            if self._connection is None:
                self._connection = connect(max_connections=_REQUESTS_AT_ONCE + _TRANSFERS_AT_ONCE)
        return self._connection

    def _submit(
        self, uri: str, call: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> Future[T]:
        loop = self._filesystem.loop
        return asyncio.run_coroutine_threadsafe(self._named(uri, call, *args, **options), loop)

    def _run(
        self, uri: str, call: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        future = self._submit(uri, call, *args, **options)
        try:
            return future.result()
        finally:
            future.cancel()  # of no effect unless this thread was interrupted

    async def _named(
        self, uri: str, call: Callable[P, Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        try:
            return await call(*args, **options)
        except RequestError as error:
            raise explain(uri, error) from error


def _split_folder(uri: str) -> tuple[str, str]:
    """Give a folder's bucket and the prefix of all names in it."""
    bucket, key = split_bucket(uri)
    return bucket, f"{key}/" if key else ""


def _parse_range(answer: dict[str, Any]) -> tuple[int, int]:
    """Read where an answer's bytes begin, and the size of the object."""
    if "ContentRange" not in answer:
        return 0, int(answer["ContentLength"])  # the server sends the whole object
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer["ContentRange"])
    if match is None:
        raise RequestError("broken", "an answer without a valid Content-Range")
    return int(match[1]), int(match[2])


def _part_bytes(size: int) -> int:
    # So that all connections end at about the same time.
    waves = -(-size // (_TRANSFERS_AT_ONCE * _LONGEST_PART_BYTES))
    return max(_PART_BYTES, -(-size // max(1, waves * _TRANSFERS_AT_ONCE)))


def _split(start: int, end: int, part_bytes: int) -> list[tuple[int, int]]:
    return [(first, min(first + part_bytes, end)) for first in range(start, end, part_bytes)]


def _read_part(source: Path, start: int, end: int) -> bytes:
    with source.open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    if len(data) != end - start:
        raise DataError(f"{source}: became shorter while it was uploaded; stop its writer")
    return data


async def _drop(position: int, piece: bytes) -> None:
    """Take a piece that nobody wants."""
