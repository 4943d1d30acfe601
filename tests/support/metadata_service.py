"""The metadata service of EC2 instances, as well and as badly as it behaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TERMINATE = '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}'


class MetadataService(ThreadingHTTPServer):
    """IMDSv2 on loopback: tokens by PUT, the rest with a token only."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens: list[str] = []
        self.tells_once = False
        """Whether only the first who asks is told of the action: one of many nodes."""
        self.refuses_tokens = False
        self.action: str | None = None
        self.code = 200
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    @property
    def service(self) -> MetadataService:
        assert isinstance(self.server, MetadataService)
        return self.server

    def do_PUT(self) -> None:
        self.service.requests.append("token")
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600"
        if self.service.refuses_tokens:
            self._answer(403, "")
            return
        self.service.tokens.append(f"token-{len(self.service.requests)}")
        self._answer(200, self.service.tokens[-1])

    def do_GET(self) -> None:
        self.service.requests.append("action")
        assert self.path == "/latest/meta-data/spot/instance-action"
        if self.headers["X-aws-ec2-metadata-token"] not in self.service.tokens:
            self._answer(401, "")
        elif self.service.code != 200:
            self._answer(self.service.code, "")
        elif self.service.action is None:
            self._answer(404, "<html>Not Found</html>")
        else:
            action = self.service.action
            if self.service.tells_once:
                self.service.action = None
            self._answer(200, action)

    def _answer(self, code: int, text: str) -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def run_metadata_service() -> Iterator[MetadataService]:
    """Run one for a block."""
    with MetadataService() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
