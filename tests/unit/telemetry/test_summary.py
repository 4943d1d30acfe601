from __future__ import annotations

import pytest

from fqgan_dist.telemetry.summary import format_number, format_seconds, parse_summary


def test_nested_metrics_are_flattened_to_dotted_names() -> None:
    summary = {
        "tokenizer": {
            "state": "done",
            "seconds": 12,
            "metrics": {"psnr": 20.5, "perplexity": {"visual": 9.0}, "curve": [1, 2]},
        }
    }
    stage = parse_summary(summary)["tokenizer"]
    assert stage.metrics == {
        "psnr": 20.5,
        "perplexity.visual": 9.0,
        "curve.0": 1,
        "curve.1": 2,
    }
    assert stage.seconds == 12.0
    assert stage.group("perplexity") == {"visual": 9.0}


@pytest.mark.parametrize("value", [None, True, "12", float("nan"), float("inf")])
def test_what_is_not_a_finite_number_is_not_a_number(value: object) -> None:
    stage = parse_summary({"samples": {"metrics": {"gfid": value}}})["samples"]
    assert stage.number("gfid") is None
    assert stage.number("absent") is None


def test_stages_keep_their_order() -> None:
    assert list(parse_summary({"b": {}, "a": {}})) == ["b", "a"]


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ({"tokenizer": 3}, "stage 'tokenizer' is 3"),
        ({"tokenizer": {"metrics": [1]}}, r"tokenizer\.metrics is \[1\]"),
        ({"tokenizer": {"metrics": {"psnr": object()}}}, "metric 'psnr'"),
    ],
)
def test_a_malformed_summary_is_refused(summary: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_summary(summary)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "True"),
        ("random", "random"),
        (0, "0"),
        (0.0, "0"),
        (0.00001234, "1.23e-05"),
        (0.12345, "0.123"),
        (20.456, "20.46"),
        (-20.456, "-20.46"),
        (123.456, "123.5"),
        (12345.6, "12 346"),
        (50000, "50 000"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_written_for_people(value: float | str | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (4.21, "4.2 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
