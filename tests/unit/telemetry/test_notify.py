"""Whoever `FQGAN_NOTIFY` names is told, and can do nothing to the run."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fqgan_dist.telemetry.notify import AFTER_VARIABLE, NOTIFY_VARIABLE, Notifier
from fqgan_dist.waiting import Wait


def told_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "told"
    script = tmp_path / "tell.py"
    script.write_text(f"import sys\nopen({str(path)!r}, 'a').write(sys.stdin.read() + '\\n')\n")
    monkeypatch.setenv(NOTIFY_VARIABLE, f"{sys.executable} {script}")
    return path


def test_a_command_gets_the_event_on_its_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = told_by_command(tmp_path, monkeypatch)
    notifier = Notifier("imagenet")
    notifier.tell("restart", "a node was lost")
    notifier.close()
    assert json.loads(path.read_text()) == {
        "event": "restart",
        "run": "imagenet",
        "text": "a node was lost",
    }


def test_an_address_gets_a_post(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(NOTIFY_VARIABLE, f"http://127.0.0.1:{server.server_port}/hook")
    notifier = Notifier("imagenet")
    notifier.tell("end", "done")
    notifier.close()
    server.shutdown()
    server.server_close()
    assert [json.loads(body)["event"] for body in bodies] == ["end"]


@pytest.mark.parametrize(
    "target",
    [
        "/no/such/program",
        "false",
        "'unbalanced",
        "http://127.0.0.1:9/secret-hook",
        "ftp://x/secret",
    ],
)
def test_its_failure_is_a_line_without_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    monkeypatch.setenv(NOTIFY_VARIABLE, target)
    notifier = Notifier("imagenet")
    notifier.tell("end", "done")
    notifier.close()
    assert "could not be told of an event" in caplog.text
    assert "secret" not in caplog.text


def test_a_long_wait_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = told_by_command(tmp_path, monkeypatch)
    monkeypatch.setenv(AFTER_VARIABLE, "60")
    notifier = Notifier("imagenet")
    for age_s in (10, 59, 61, 90):
        notifier.watch(Wait(what="storage", since=time.time() - age_s))
    notifier.watch(None)
    notifier.watch(Wait(what="storage", since=time.time() - 30))
    notifier.close()
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["event"] == "waiting"
    assert "for storage" in json.loads(line)["text"]


def test_without_a_target_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NOTIFY_VARIABLE, raising=False)
    before = threading.active_count()
    notifier = Notifier("imagenet")
    notifier.tell("end", "done")
    assert threading.active_count() == before
    notifier.close()
