"""A small S3 server in this process: whole objects and such of parts, ranges, conditions, pages of
listings, and any error on demand.

For errors that the real server of the integration tests cannot be made to give, and for machines
that lack it. It checks no signatures.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest


@dataclass(frozen=True)
class ErrorAnswer:
    """What the server answers to every request while it is set."""

    status: int
    code: str
    headers: dict[str, str] = field(default_factory=dict)
    elements: str = ""
    """More XML inside <Error>."""


@dataclass
class LostRequests:
    """Requests that the network loses, counted from 1 on since this was set."""

    number: int | None
    """None: none is lost, and all are counted."""
    mode: Literal["this and later", "later, and its answer", "its answer"]
    count: int = 0

    def is_lost(self, number: int) -> bool:
        """Whether a request never comes to the server."""
        if self.number is None or self.mode == "its answer":
            return False
        return number > self.number or (number == self.number and self.mode == "this and later")

    def is_answer_lost(self, number: int) -> bool:
        """Whether the server does what is asked, and nobody hears of it."""
        return number == self.number and self.mode != "this and later"


@dataclass
class Upload:
    """An object that is being written in parts."""

    path: str
    parts: dict[int, bytes] = field(default_factory=dict)
    begun: datetime = field(default_factory=lambda: datetime.now(UTC))


@dataclass
class SmallS3:
    """The server's state: objects by "/bucket/key", not percent-encoded."""

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    """By their ids, as long as they are neither completed nor aborted."""
    lost: LostRequests | None = None
    error: ErrorAnswer | None = None
    claimed_size: int | None = None
    """What answers say that an object's size is; None: the truth."""
    lists_in_order: bool = True
    """Whether listings are sorted, as S3's are; else they are as the objects came."""
    knows_conditions: bool = True
    """Whether If-Match of a put is understood; else such a put is refused."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    state: SmallS3
    number = 0

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.state.lost is not None and self.state.lost.is_answer_lost(self.number):
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, elements: str = "", **headers: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message>{elements}</Error>"
        self._answer(status, body.encode(), Content_Type="application/xml", **headers)

    def _is_refused(self) -> bool:
        """Whether this request is done with; asked once for each."""
        if (lost := self.state.lost) is not None:
            with self.state.lock:
                lost.count += 1
                self.number = lost.count
            if lost.is_lost(self.number):
                self.close_connection = True
                return True
        error = self.state.error
        if error is not None:
            headers = {name.replace("-", "_"): value for name, value in error.headers.items()}
            self._refuse(error.status, error.code, error.elements, **headers)
        return error is not None

    @property
    def _path(self) -> str:
        return unquote(self.path.partition("?")[0])

    def do_GET(self) -> None:
        if self._is_refused():
            return
        if "list-type=2" in self.path:
            self._list()
            return
        if "uploads" in self._query:
            self._list_uploads()
            return
        if "uploadId" in self._query:
            self._list_parts()
            return
        data = self.state.objects.get(self._path)
        if data is None:
            self._refuse(404, "NoSuchKey")
            return
        etag = _etag(data)
        if self.headers.get("If-Match", etag) != etag:
            self._refuse(412, "PreconditionFailed")
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, data, ETag=etag)
        elif int(span[1]) >= len(data):
            self._refuse(416, "InvalidRange")
        else:
            part = data[int(span[1]) : int(span[2]) + 1]
            size = self.state.claimed_size or len(data)
            last = int(span[1]) + len(part) - 1
            self._answer(206, part, ETag=etag, Content_Range=f"bytes {span[1]}-{last}/{size}")

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:
            self.close_connection = True  # the client went away
        elif self._is_refused():
            pass
        elif "uploadId" in self._query:
            self._put_part(data)
        elif not self._takes(data):
            self._refuse(412, "PreconditionFailed")
        else:
            self._answer(200, ETag=_etag(data))

    def _takes(self, data: bytes) -> bool:
        """Keep an object, unless a condition of the request forbids it."""
        with self.state.lock:
            former = self.state.objects.get(self._path)
            if former is not None and "If-None-Match" in self.headers:
                return False
            if (expected := self.headers.get("If-Match")) is not None and (
                not self.state.knows_conditions or expected != _etag(former or b"")
            ):
                return False
            self.state.objects[self._path] = data
            return True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self._is_refused():
            return
        if "uploads" in self._query:
            number = uuid.uuid4().hex
            self.state.uploads[number] = Upload(self._path)
            text = f"<UploadId>{number}</UploadId>"
            self._answer(
                200,
                f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>".encode(),
            )
            return
        with self.state.lock:
            upload = self.state.uploads.pop(self._query["uploadId"], None)
            if upload is not None:
                parts = sorted(upload.parts.items())
                self.state.objects[self._path] = b"".join(data for _, data in parts)
        if upload is None:
            self._refuse(404, "NoSuchUpload")
        else:
            body = "<CompleteMultipartUploadResult></CompleteMultipartUploadResult>"
            self._answer(200, body.encode())

    def do_DELETE(self) -> None:
        if self._is_refused():
            return
        if (number := self._query.get("uploadId")) is not None:
            if self.state.uploads.pop(number, None) is None:
                self._refuse(404, "NoSuchUpload")
            else:
                self._answer(204)
        else:
            self.state.objects.pop(self._path, None)
            self._answer(204)

    @property
    def _query(self) -> dict[str, str]:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values[0] for name, values in query.items()}

    def _put_part(self, data: bytes) -> None:
        with self.state.lock:
            upload = self.state.uploads.get(self._query["uploadId"])
            if upload is not None:
                upload.parts[int(self._query["partNumber"])] = data
        if upload is None:
            self._refuse(404, "NoSuchUpload")
        else:
            self._answer(200, ETag=_etag(data))

    def _list_uploads(self) -> None:
        """List two to a page, so that who asks sees several."""
        bucket, prefix = f"{self._path.rstrip('/')}/", self._query.get("prefix", "")
        found = sorted(
            (upload.path.removeprefix(bucket), number, upload.begun)
            for number, upload in self.state.uploads.items()
            if upload.path.startswith(bucket + prefix)
        )
        after = (self._query.get("key-marker", ""), self._query.get("upload-id-marker", ""))
        left = [each for each in found if each[:2] > after]
        body = "".join(
            f"<Upload><Key>{quote(key)}</Key><UploadId>{number}</UploadId>"
            f"<Initiated>{begun.strftime('%Y-%m-%dT%H:%M:%S.000Z')}</Initiated></Upload>"
            for key, number, begun in left[:2]
        )
        if len(left) > 2:
            body += "<IsTruncated>true</IsTruncated>"
            body += f"<NextKeyMarker>{quote(left[1][0])}</NextKeyMarker>"
            body += f"<NextUploadIdMarker>{left[1][1]}</NextUploadIdMarker>"
        answer = f"<ListMultipartUploadsResult><EncodingType>url</EncodingType>{body}"
        self._answer(200, f"{answer}</ListMultipartUploadsResult>".encode())

    def _list_parts(self) -> None:
        upload = self.state.uploads.get(self._query["uploadId"])
        if upload is None:
            self._refuse(404, "NoSuchUpload")
            return
        body = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{len(data)}</Size></Part>"
            for number, data in sorted(upload.parts.items())
        )
        self._answer(200, f"<ListPartsResult>{body}</ListPartsResult>".encode())

    def _list(self) -> None:
        query = self._query
        bucket, prefix = f"{self._path.rstrip('/')}/", query.get("prefix", "")
        entries: dict[str, str] = {}
        for path, data in list(self.state.objects.items()):
            key = path.removeprefix(bucket)
            if not (path.startswith(bucket) and key.startswith(prefix)):
                continue
            head, slash, _ = key[len(prefix) :].partition(query.get("delimiter", "\0"))
            if slash:
                name = f"{prefix}{head}{slash}"
                entries[name] = f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>"
            else:
                entries[key] = (
                    f"<Contents><Key>{quote(key)}</Key><Size>{len(data)}</Size></Contents>"
                )
        names = sorted(entries, key=str.encode) if self.state.lists_in_order else list(entries)
        start = int(query.get("continuation-token", 0))
        end = start + min(1000, int(query.get("max-keys", 1000)))
        body = "".join(entries[name] for name in names[start:end])
        if end < len(names):
            body += "<IsTruncated>true</IsTruncated>"
            body += f"<NextContinuationToken>{end}</NextContinuationToken>"
        answer = f"<ListBucketResult><EncodingType>url</EncodingType>{body}</ListBucketResult>"
        self._answer(200, answer.encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # one waits on each connection that a client keeps open
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Be silent: connections are cut on purpose."""


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@contextmanager
def run_small_s3() -> Iterator[SmallS3]:
    """Serve on a free port of loopback until the end of the block."""
    state = SmallS3()
    handler = type("Handler", (_Handler,), {"state": state})
    with _Server(("127.0.0.1", 0), handler) as server:
        state.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def set_credentials(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Give this process an endpoint and some credentials, and no others."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
