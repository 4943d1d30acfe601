from __future__ import annotations

from typing import Any

import pytest

from fqgan_dist.report.cards import Card, build_cards, render_card
from fqgan_dist.telemetry.summary import parse_summary


def single_card(stage: str, metrics: dict[str, Any]) -> Card:
    (card,) = build_cards(parse_summary({stage: {"state": "done", "metrics": metrics}}))
    return card


@pytest.mark.parametrize(
    ("baseline", "verdict", "text"),
    [
        (12.0, "good", "+8.0 dB: above the mean image"),
        (20.0, "bad", "+0.0 dB: not above the mean image"),
        (25.0, "bad", "-5.0 dB: not above the mean image"),
        (None, "neutral", "no mean-image baseline was recorded"),
    ],
)
def test_psnr_is_judged_by_the_mean_image(baseline: float | None, verdict: str, text: str) -> None:
    card = single_card("tokenizer", {"psnr": 20.0, "psnr_mean_image": baseline})
    assert (card.value, card.verdict, card.text) == ("20", verdict, text)


@pytest.mark.parametrize(
    ("entropy", "verdict", "text"),
    [
        (5.5, "good", "1.50 nats below the unigram entropy: context is used"),
        (4.0, "bad", "0.00 nats above the unigram entropy: no better than code counts"),
        (3.0, "bad", "1.00 nats above the unigram entropy: no better than code counts"),
        (
            {"visual": 5.0, "semantic": 6.0},
            "good",
            "1.50 nats below the unigram entropy: context is used",
        ),
        (None, "neutral", "no unigram entropy was recorded"),
    ],
)
def test_the_loss_is_judged_by_the_unigram_entropy(
    entropy: float | dict[str, float] | None, verdict: str, text: str
) -> None:
    card = single_card("autoregressive", {"validation_loss": 4.0, "unigram_entropy": entropy})
    assert (card.verdict, card.text) == (verdict, text)


@pytest.mark.parametrize(("stage", "name"), [("tokenizer", "rfid"), ("samples", "gfid")])
def test_a_fid_of_random_weights_says_so(stage: str, name: str) -> None:
    metrics = {name: 12.5, "images": 50000, f"{name}_evaluator": "inception-random-1"}
    card = single_card(stage, metrics)
    assert card.verdict == "warn"
    assert "not comparable" in card.text
    assert card.details == {"images": "50 000", "evaluator": "inception-random-1"}


def test_a_fid_of_real_weights_has_no_warning() -> None:
    card = single_card("samples", {"gfid": 3.2, "gfid_evaluator": "torch-fidelity inception"})
    assert (card.verdict, card.text) == ("neutral", "lower is better")


@pytest.mark.parametrize(("smallest", "verdict"), [(1.0, "bad"), (100.0, "good")])
def test_a_collapsed_codebook_is_bad(smallest: float, verdict: str) -> None:
    perplexity = {"visual": 256.0, "semantic": smallest}
    card = single_card("tokenizer", {"perplexity": perplexity, "codebook_size": 512})
    assert card.verdict == verdict
    assert [bar.fraction for bar in card.bars] == [0.5, smallest / 512]
    assert card.unit == "of 512"


def test_the_used_part_of_each_codebook_is_shown() -> None:
    card = single_card(
        "tokenizer", {"perplexity": {"semantic_mid": 9.0}, "usage": {"semantic_mid": 0.125}}
    )
    assert card.details == {"semantic mid used": "12.5 %"}


def test_numbers_that_the_run_lacks_have_no_card() -> None:
    assert build_cards(parse_summary({"tokenizer": {}, "autoregressive": {}, "samples": {}})) == []


def test_bars_stay_inside_their_track() -> None:
    card = single_card("tokenizer", {"perplexity": {"visual": 600.0}, "codebook_size": 512})
    assert "width:100.0%" in render_card(card)


def test_texts_of_a_card_are_escaped() -> None:
    card = single_card("tokenizer", {"rfid": 1.0, "rfid_reference": '<img src="x">'})
    html = render_card(card)
    assert "<img" not in html
    assert "&lt;img src=&#34;x&#34;&gt;" in html
