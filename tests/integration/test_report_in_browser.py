"""The report in a real browser: headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from fqgan_dist.report.inputs import ReportInputs
from fqgan_dist.report.page import build_report

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

# A missing browser must be seen: the summary of the run names the reason.
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="NO BROWSER: the report is not checked; run `apt-get install -y chromium`",
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
ANSWER_TIMEOUT_S = 120.0  # Chromium on a shared core takes many seconds to start.

PAGE_FACTS = """
(async () => {
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const failed = image => !image.complete || image.naturalWidth === 0;
  return {
    images: images.length,
    broken: images.filter(failed).map(image => image.alt || image.src.slice(0, 80)),
    sections: [...document.querySelectorAll("section")].map(section => section.id),
    scripts: document.scripts.length,
    title: document.title,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
  };
})()
"""


@dataclass
class PageView:
    """What a browser made of a page."""

    facts: dict[str, Any]
    screenshot: np.ndarray
    errors: list[str] = field(default_factory=list)
    """Console errors, uncaught exceptions, and what the browser itself logs as an error."""
    requests: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [*self.errors, *(f"broken image: {name}" for name in self.facts["broken"])]


class Browser:
    """One Chromium; DevTools messages pass through a pair of pipes, so no port is opened."""

    def __init__(self, executable: str, profile: Path) -> None:
        command_read, self._command = os.pipe()
        self._answers, answer_write = os.pipe()
        arguments = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # Chromium takes commands from descriptor 3 and answers on 4; bash puts the pipes there.
        script = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", executable, *arguments],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._buffer = b""
        self._last_id = 0
        self._events: list[dict[str, Any]] = []

    def view(self, page: Path, *, width: int = 1280, color_scheme: str = "light") -> PageView:
        """Load a page, wait until it stands, and collect what went wrong."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", session, **metrics)
        scheme = [{"name": "prefers-color-scheme", "value": color_scheme}]
        self._call("Emulation.setEmulatedMedia", session, features=scheme)
        self._call("Page.setLifecycleEventsEnabled", session, enabled=True)
        loader = self._call("Page.navigate", session, url=page.as_uri())["loaderId"]
        self._wait_until_loaded(loader)
        facts = self._call(
            "Runtime.evaluate",
            session,
            expression=PAGE_FACTS,
            awaitPromise=True,
            returnByValue=True,
        )["result"]["value"]
        shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True)["data"]
        events = [event for event in self._events if event.get("sessionId") == session]
        self._events.clear()
        self._call("Target.closeTarget", targetId=target)
        return PageView(
            facts=facts,
            screenshot=np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")),
            errors=[text for event in events if (text := _error_text(event))],
            requests=[
                event["params"]["request"]["url"]
                for event in events
                if event["method"] == "Network.requestWillBeSent"
            ],
        )

    def close(self) -> None:
        os.close(self._command)  # Chromium ends when its pipe does.
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._command, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _wait_until_loaded(self, loader: str) -> None:
        # By loader: the load event of about:blank may come late.
        expected = {"loaderId": loader, "name": "load"}
        while not any(
            event["method"] == "Page.lifecycleEvent" and expected.items() <= event["params"].items()
            for event in self._events
        ):
            self._receive()

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select(
                [self._answers], [], [], max(deadline - time.monotonic(), 0)
            )
            assert ready, f"Chromium did not answer within {ANSWER_TIMEOUT_S} s"
            chunk = os.read(self._answers, 1 << 20)
            assert chunk, f"Chromium ended with status {self._process.poll()}"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message


def _error_text(event: dict[str, Any]) -> str | None:
    params = event.get("params", {})
    match event["method"]:
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
            return "console: " + " ".join(str(arg.get("value")) for arg in params["args"])
        case "Runtime.exceptionThrown":
            return "exception: " + params["exceptionDetails"]["text"]
        case "Log.entryAdded" if params["entry"]["level"] == "error":
            return "log: " + params["entry"]["text"]
    return None


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def photograph_crops(count: int) -> np.ndarray:
    photograph = data.astronaut()
    offsets = np.linspace(0, 448, count, dtype=int)
    return np.stack([photograph[offset : offset + 64, offset : offset + 64] for offset in offsets])


def report_inputs() -> ReportInputs:
    originals = photograph_crops(10)
    blurred = (originals // 32 * 32).astype(np.uint8)
    records = [
        {"step": step, "images_seen": 8 * step, "time": 0.0, "tokenizer/loss/total": 5.0 / step}
        for step in range(1, 300)
    ]
    return ReportInputs(
        run_name="browser test <b>&</b>",
        summary={
            "tokenizer": {
                "state": "done",
                "seconds": 61.0,
                "metrics": {
                    "psnr": 20.4,
                    "psnr_mean_image": 12.1,
                    "rfid": 31.5,
                    "rfid_evaluator": "inception-random-1234 at 75 px",
                    "perplexity": {"visual": 200.0, "semantic": 120.0},
                    "codebook_size": 512,
                },
            },
            "autoregressive": {
                "state": "done",
                "seconds": 30.0,
                "metrics": {"validation_loss": 4.4, "unigram_entropy": 5.3},
            },
            "samples": {"state": "done", "seconds": 9.0, "metrics": {"gfid": 55.0}},
        },
        config_yaml="name: browser\ntraining:\n  seed: 1 # <script>alert(1)</script>\n",
        environment={"python": "3.11", "packages": {"torch": "2.15"}},
        metrics={"tokenizer": records},
        originals=originals,
        reconstructions=blurred,
        single_codebook={"visual": blurred, "semantic": 255 - originals},
        samples={"<script>console.error('class name')</script>": blurred[:4]},
        notes=["random weights: not comparable with published numbers"],
    )


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "report.html"
    page.write_text(build_report(report_inputs()), encoding="utf-8")
    return page


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_the_report_loads_without_broken_images_and_console_errors(
    browser: Browser, report_page: Path, color_scheme: str
) -> None:
    view = browser.view(report_page, color_scheme=color_scheme)
    assert view.problems == []
    # 4 rows of 10, 4 samples, 1 curve.
    assert view.facts["images"] == 45
    assert view.facts["title"].startswith("browser test <b>&</b>")
    assert view.facts["sections"] == [
        "results",
        "stages",
        "reconstructions",
        "samples",
        "curves",
        "configuration",
        "environment",
    ]


@pytest.mark.parametrize(("color_scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_screenshot_is_not_blank(
    browser: Browser, report_page: Path, color_scheme: str, is_dark: bool
) -> None:
    pixels = browser.view(report_page, color_scheme=color_scheme).screenshot
    assert pixels.shape[0] > 1500
    assert (pixels.mean() < 128) == is_dark
    # Text, cards and photographs: every band of the page has more than its background.
    colors = pixels.astype(np.int64) @ [1 << 16, 1 << 8, 1]
    assert all(len(np.unique(band)) > 20 for band in np.array_split(colors, 8))


def test_the_originals_are_shown_pixel_for_pixel(browser: Browser, report_page: Path) -> None:
    pixels = browser.view(report_page).screenshot
    # Pixelated scaling keeps colours; not at the corners, which are rounded.
    color = photograph_crops(10)[0, 32, 32]
    assert (pixels == color).all(axis=-1).any()


def test_the_page_asks_for_nothing_but_itself(browser: Browser, report_page: Path) -> None:
    view = browser.view(report_page)
    assert view.facts["scripts"] == 0
    others = [url for url in view.requests if not url.startswith("data:")]
    assert others == [report_page.as_uri()]


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_the_page_never_scrolls_sideways(browser: Browser, report_page: Path, width: int) -> None:
    assert browser.view(report_page, width=width).facts["overflow"] <= 0


BROKEN_PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg=="


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (f'<img alt="torn" src="{BROKEN_PNG}">', "broken image: torn"),
        ('<img alt="absent" src="absent.png">', "broken image: absent"),
        ("<script>console.error('spoken')</script>", "console: spoken"),
        ("<script>throw new Error('thrown')</script>", "exception: Uncaught"),
        ('<script src="absent.js"></script>', "log: Failed to load resource"),
    ],
)
def test_these_checks_fail_on_a_bad_page(
    browser: Browser, tmp_path: Path, body: str, problem: str
) -> None:
    page = tmp_path / "bad.html"
    page.write_text(f"<!DOCTYPE html><title>bad</title>{body}", encoding="utf-8")
    problems = browser.view(page).problems
    assert any(text.startswith(problem) for text in problems), problems


def test_a_torn_image_in_a_report_is_found(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "torn.html"
    html = build_report(report_inputs())
    start = html.index('src="data:image/png;base64,') + len('src="data:image/png;base64,')
    page.write_text(html[:start] + html[start + 400 :], encoding="utf-8")
    assert browser.view(page).problems == ["broken image: original, image 1"]


def test_a_script_that_slipped_into_a_report_does_not_run(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "injected.html"
    html = build_report(report_inputs())
    script = "<script>document.title = 'taken over'</script></main>"
    page.write_text(html.replace("</main>", script), encoding="utf-8")
    view = browser.view(page)
    assert view.facts["title"] != "taken over"
    assert any("Content Security Policy" in text for text in view.errors)
