from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Mapping

import pytest
from support.sessions import resumed_at

from fqgan_dist.telemetry.metric_sink import MetricSink
from fqgan_dist.telemetry.observer import SILENT, LocalObserver, Observer, ObserverSink


def test_it_tracks_in_this_process_and_survives_pickling(
    caplog: pytest.LogCaptureFixture,
) -> None:
    observer: Observer = pickle.loads(pickle.dumps(LocalObserver()))
    with (
        caplog.at_level(logging.INFO),
        observer.track(4, "teachers", "images") as bar,
    ):
        bar.skip(1)
        bar.advance(3)
    observer.record_metrics("tokenizer", 1, {"tokenizer/loss/total": 0.5})
    (line,) = caplog.messages
    assert line.startswith("teachers: 4/4 images")
    assert observer == LocalObserver()


def test_without_a_bar_a_terminal_gets_log_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with (
        caplog.at_level(logging.INFO),
        LocalObserver(has_bar=False).track(2, "training", "steps") as bar,
    ):
        bar.advance(2)
    assert len(caplog.messages) == 1


def test_a_silent_one_counts_and_shows_nothing(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    observer: Observer = pickle.loads(pickle.dumps(SILENT))
    with caplog.at_level(logging.INFO), observer.track(4, "teachers", "images") as bar:
        bar.advance(4)
    observer.record_metrics("tokenizer", 1, {"tokenizer/loss/total": 0.5})
    assert bar.progress().is_complete
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")


def test_a_sink_passes_every_record_on() -> None:
    seen: list[tuple[str, int, dict[str, float]]] = []

    class Noting(LocalObserver):
        def record_metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
            seen.append((stage, step, dict(values)))

    sink: MetricSink = ObserverSink(Noting(), "tokenizer")
    sink.open(resumed_at(0))
    sink.write(1, {"tokenizer/loss/total": 0.5}, images_seen=8)
    sink.write(1, {"tokenizer/validation/psnr": float("inf")}, images_seen=8)
    sink.flush()
    sink.close()
    assert seen == [
        ("tokenizer", 1, {"tokenizer/loss/total": 0.5}),
        ("tokenizer", 1, {"tokenizer/validation/psnr": float("inf")}),
    ]
