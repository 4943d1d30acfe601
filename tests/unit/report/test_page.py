from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from fqgan_dist.report.inputs import ReportInputs
from fqgan_dist.report.page import build_report

EVIL = "</span><script>alert('x')</script><img src=x onerror=\"y\">"
VOID = {"meta", "link", "img", "source", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and URLs, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text.append(data)


def images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def build_inputs(**parts: Any) -> ReportInputs:
    full = {
        "run_name": "run",
        "summary": {
            "tokenizer": {"state": "done", "seconds": 75.0, "metrics": {"psnr": 20.5}},
            "samples": {"state": "failed", "metrics": {}},
        },
        "config_yaml": "# comment\ntraining:\n  lr: 0.1\n  uri: s3://bucket/x\n- item\n",
        "environment": {
            "torch": "2.15",
            "git": {"commit": "0123456789abcdef", "modified": True},
            "gpus": [{"name": "A100", "memory_gib": 80.0}] * 2,
            "packages": {"ray": "2.60.0", "absent": None},
        },
        "metrics": {"tokenizer": [{"step": 1, "tokenizer/loss/total": 1.0}]},
        "originals": images(10),
        "reconstructions": images(10),
        "single_codebook": {"visual": images(10)},
        "samples": {"cat": images(3)},
        "notes": ["random weights"],
    }
    return ReportInputs(**(full | parts))


def test_every_part_is_on_the_page() -> None:
    html = build_report(build_inputs())
    page = Page(html)
    text = " ".join(page.text)
    assert type(html) is str
    for expected in ("run", "20.50", "1 min 15 s", "failed", "cat", "random weights", "2.60.0"):
        assert expected in text
    for expected in ("0123456789 (modified)", "2 x A100", "lr:", "visual only"):
        assert expected in text
    # 3 rows of 10 images, 3 samples, 1 curve.
    assert page.tags.count("img") == 34
    assert page.tags.count("section") == 7


def test_the_configuration_is_shown_word_for_word() -> None:
    html = build_report(build_inputs(config_yaml="a:\n  - b: 1 # <c>\n  # d: e\n'f': g:h\n"))
    (pre,) = re.findall(r"<pre>(.*?)</pre>", html, flags=re.DOTALL)
    plain = re.sub(r"<[^>]+>", "", pre).replace("&lt;", "<").replace("&gt;", ">")
    assert plain.replace("&#39;", "'") == "a:\n  - b: 1 # <c>\n  # d: e\n'f': g:h"


def test_nothing_is_loaded_and_no_script_runs() -> None:
    page = Page(build_report(build_inputs()))
    assert "script" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "srcset"):
            assert value is not None
            assert value.startswith("data:image/")
        if name == "href":
            assert value is not None
            assert value.startswith(("#", "data:"))
    policies = [value for name, value in page.attributes if name == "content"]
    assert any(value and "default-src 'none'" in value for value in policies)


@pytest.mark.parametrize(
    "parts",
    [
        {"run_name": EVIL},
        {"summary": {EVIL: {"state": EVIL, "metrics": {EVIL: EVIL}}}},
        {"config_yaml": f"{EVIL}: {EVIL}\n# {EVIL}"},
        {"environment": {EVIL: {EVIL: EVIL}, "git": {"commit": EVIL}, "torch": EVIL}},
        {"environment": {"gpus": [{"name": EVIL}], "list": [EVIL]}},
        {"metrics": {EVIL: [{"step": 1, f"{EVIL}/{EVIL}": 1.0}]}},
        {"single_codebook": {EVIL: images(10)}},
        {"samples": {EVIL: images(2)}},
        {"notes": [EVIL]},
    ],
)
def test_names_are_escaped(parts: dict[str, Any]) -> None:
    html = build_report(build_inputs(**parts))
    page = Page(html)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "script" in "".join(page.text)


def test_an_empty_run_still_has_a_page() -> None:
    html = build_report(ReportInputs(run_name="empty", summary={}, config_yaml="", environment={}))
    page = Page(html)
    assert "empty" in page.text
    assert "section" not in page.tags
    assert "img" not in page.tags


def test_the_same_run_gives_the_same_page() -> None:
    assert build_report(build_inputs()) == build_report(build_inputs())


def test_records_of_other_settings_are_listed_with_what_differs() -> None:
    other = {
        "state": "done",
        "inputs": {"settings.sampling.guidance_scale": 3.0},
        "metrics": {"samples/gfid": 7.25},
    }
    stages = {
        "tokenizer": {"state": "done", "seconds": 75.0, "metrics": {"psnr": 20.5}},
        "samples": {"state": "done", "seconds": 1.0, "metrics": {}, "others": [other]},
    }
    text = " ".join(Page(build_report(build_inputs(summary=stages))).text)
    assert "Other records" in text
    assert "sampling.guidance_scale  3" in text
    assert "samples / gfid  7.250" in text
    del stages["samples"]["others"]
    assert "Other records" not in build_report(build_inputs(summary=stages))


def test_names_show_as_what_they_are() -> None:
    """No mark of direction or control character of a name turns the text around it."""
    page = build_report(build_inputs(run_name="a\u202eb\x1bc\udc80d"))
    assert "a\\u202eb\\x1bc\\udc80d" in page
    page.encode()
