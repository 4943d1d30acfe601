from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from fqgan_dist.telemetry.progress import ProgressBar, RateMeter, render_summary, track


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_without_a_terminal_a_line_is_logged_every_ten_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with (
        caplog.at_level(logging.INFO),
        track(40, "teachers", "images", console=plain_console(), clock=clock) as bar,
    ):
        for _ in range(40):
            clock.now += 1
            bar.advance(1, loss=0.25)
    assert caplog.messages == [
        "teachers: 10/40 images, 1.0 images/s, 30.0 s left, loss 0.250",
        "teachers: 20/40 images, 1.0 images/s, 20.0 s left, loss 0.250",
        "teachers: 30/40 images, 1.0 images/s, 10.0 s left, loss 0.250",
        "teachers: 40/40 images, 1.0 images/s, 40.0 s, loss 0.250",
    ]


def test_an_unknown_total_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with (
        caplog.at_level(logging.INFO),
        track(None, "reading", "rows", console=plain_console(), clock=clock) as bar,
    ):
        clock.now = 2
        bar.advance(6)
    assert caplog.messages == ["reading: 6 rows, 3.0 rows/s, 2.0 s"]


def test_an_error_inside_passes_through_without_a_final_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(RuntimeError, match="broken"),
        track(3, "work", "units", console=plain_console()),
    ):
        raise RuntimeError("broken")
    assert caplog.messages == []


def test_a_terminal_gets_a_live_bar_and_no_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with (
        caplog.at_level(logging.INFO),
        track(3, "work [1]", "images", console=console) as bar,
    ):
        bar.advance(3, loss=1.5)
    assert caplog.messages == []
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "work [1]" in text
    assert "3/3" in text
    assert "loss 1.500" in text


def test_the_summary_table_shows_stages_and_metrics() -> None:
    text = render_summary(
        {
            "shards": {"state": "done", "seconds": 3.0, "metrics": {}},
            "tokenizer": {
                "state": "running",
                "metrics": {"psnr": 20.456, "perplexity": {"[bold]visual": 9.5}},
            },
        }
    )
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "state", "time", "metrics"]
    assert any(line.split() == ["shards", "done", "3.0", "s"] for line in lines)
    assert any(
        line.split() == ["tokenizer", "running", "-", "psnr", "=", "20.46"] for line in lines
    )
    assert "perplexity.[bold]visual = 9.500" in text
    assert "\x1b" not in text


def test_skipped_units_move_the_bar_but_are_no_throughput(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with (
        caplog.at_level(logging.INFO),
        track(100, "codes", "images", console=plain_console(), clock=clock) as bar,
    ):
        bar.skip(80)
        clock.now = 10
        bar.advance(10)
    assert caplog.messages == ["codes: 90/100 images, 1.0 images/s, 10.0 s left"]


def test_skipped_units_are_seen_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with track(100, "codes", "images", console=console) as bar:
        bar.skip(80)
        bar.advance(10)
    assert isinstance(console.file, io.StringIO)
    assert "90/100" in console.file.getvalue()


def test_a_terminal_shows_the_rate_of_this_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without the thread that draws, so that only the end is drawn, at a time that is known.
    monkeypatch.setattr("rich.live._RefreshThread.run", lambda _: None)
    clock, console = Clock(), Console(file=io.StringIO(), force_terminal=True, width=120)
    with track(1000, "codes", "images", console=console, clock=clock) as bar:
        bar.skip(800)
        clock.now = 10
        bar.advance(100)
    assert isinstance(console.file, io.StringIO)
    assert "900/1000 images, 10.0 images/s, 10.0 s left" in console.file.getvalue()


def test_work_of_no_units_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), track(0, "work", "units", console=plain_console()):
        pass
    assert caplog.messages == []


def test_a_bar_tells_how_far_the_work_is() -> None:
    clock = Clock()
    bar = ProgressBar(100, "unpacking", "bytes", clock=clock)
    bar.skip(20)
    bar.advance(10, files=1)
    bar.advance_to(60)
    clock.now = 8
    bar.advance(0, files=2, problems=1)
    state = bar.progress()
    assert (state.done, state.total, state.skipped, state.rate) == (60, 100, 20, 5)
    assert state.left_s == 8
    assert state.fields == {"files": 2, "problems": 1}
    assert state.describe() == (
        "unpacking: 60/100 bytes, 5.0 bytes/s, 8.0 s left, files 2  problems 1"
    )


def test_the_rate_is_that_of_the_last_minute() -> None:
    meter = RateMeter(window_s=60)
    assert meter.add(0, 0) is None
    assert meter.add(10, 100) == 10
    rates = [meter.add(now, 100 + 2 * (now - 10)) for now in range(20, 110, 10)]
    assert rates[-1] == 2


def test_the_rate_of_units_rarer_than_the_window_is_known() -> None:
    meter = RateMeter(window_s=60)
    meter.add(0, 0)
    meter.add(600, 1)
    assert meter.add(1200, 2) == 1 / 600


def test_the_rate_of_rare_units_does_not_depend_on_how_often_it_is_asked_for() -> None:
    meter = RateMeter(window_s=60)
    rates = [meter.add(now, now // 600) for now in range(0, 1800, 10)]
    assert rates[59] is None
    assert rates[60:] == [1 / 600] * 120


def test_the_rate_starts_anew_with_the_work() -> None:
    meter = RateMeter()
    meter.add(0, 0)
    meter.add(10, 50)
    assert meter.add(20, 0) is None
