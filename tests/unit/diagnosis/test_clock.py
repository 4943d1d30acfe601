from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fqgan_dist.diagnosis.clock import check_server_clock, judge_skew

StartServer = Callable[[float | None], None]


@pytest.fixture
def start_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartServer]:
    """Starts an S3 endpoint that refuses and whose clock is off; None: it tells no time."""
    with ExitStack() as stack:

        def start(offset_s: float | None) -> None:
            class Refusing(BaseHTTPRequestHandler):
                def do_HEAD(self) -> None:
                    self.send_response_only(403)
                    if offset_s is not None:
                        self.send_header("Date", formatdate(time.time() + offset_s, usegmt=True))
                    self.end_headers()

                def log_message(self, format: str, *args: object) -> None:
                    pass

            server = stack.enter_context(HTTPServer(("127.0.0.1", 0), Refusing))
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")

        yield start


def test_equal_clocks_agree(start_server: StartServer) -> None:
    start_server(0.0)
    verdict = check_server_clock()
    assert verdict.status == "ok"
    assert verdict.finding.startswith("agrees with the S3 server")


@pytest.mark.parametrize(
    ("offset_s", "status", "text"),
    [
        (60.0, "warning", "behind the S3 server"),
        (-60.0, "warning", "ahead of the S3 server"),
        (3600.0, "failed", "behind the S3 server"),
    ],
)
def test_another_time_is_said(
    start_server: StartServer, offset_s: float, status: str, text: str
) -> None:
    start_server(offset_s)
    verdict = check_server_clock()
    assert verdict.status == status
    assert text in verdict.finding
    skew_s = float(verdict.finding.split()[0])
    assert math.isclose(skew_s, abs(offset_s), abs_tol=2)


def test_a_server_without_a_date_is_a_warning(start_server: StartServer) -> None:
    start_server(None)
    assert "sends no Date" in check_server_clock().finding


def test_a_server_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    verdict = check_server_clock()
    assert verdict.status == "warning"
    assert "does not answer" in verdict.finding


@pytest.mark.parametrize(
    ("skew_s", "uncertainty_s", "status"),
    [(0.5, 1.0, "ok"), (5.9, 1.0, "ok"), (6.1, 1.0, "warning"), (-62.0, 1.0, "failed")],
)
def test_only_what_is_certain_counts(skew_s: float, uncertainty_s: float, status: str) -> None:
    verdict = judge_skew(
        "clock", skew_s, uncertainty_s=uncertainty_s, other="x", refused_s=60.0, large_s=5.0
    )
    assert verdict.status == status
