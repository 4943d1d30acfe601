"""The cards at the head of the report: each a number of the run and what it says about the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from fqgan_dist.report.curves import humanise, mean_over_codebooks
from fqgan_dist.report.html import join
from fqgan_dist.telemetry.summary import StageSummary, format_number

Verdict = Literal["good", "bad", "warn", "neutral"]

_CARD = Markup(
    '<article class="card {verdict}"><h3>{title}</h3>'
    '<p class="value">{value}<span class="unit">{unit}</span></p>'
    '<div class="bars">{bars}</div><p class="verdict">{text}</p>{details}</article>'
)
_BAR = Markup(
    '<div class="bar"><span class="bar-label">{label}</span>'
    '<span class="bar-track"><span class="bar-fill {kind}" style="width:{percent}%"></span></span>'
    '<span class="bar-value">{value}</span></div>'
)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A horizontal bar; `fraction` of the full width, in [0, 1]."""

    label: str
    value: str
    fraction: float
    is_reference: bool = False


@dataclass(frozen=True, kw_only=True)
class Card:
    """One number with its verdict."""

    title: str
    value: str
    unit: str = ""
    verdict: Verdict
    text: str
    """The verdict in words."""
    bars: list[Bar] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    """What the number depends on: evaluator, reference, number of samples."""


def build_cards(stages: Mapping[str, StageSummary]) -> list[Card]:
    """Build the cards of the numbers that the run has."""
    tokenizer = stages.get("tokenizer")
    autoregressive = stages.get("autoregressive")
    samples = stages.get("samples")
    cards = [
        _psnr_card(tokenizer) if tokenizer else None,
        _fid_card(tokenizer, "rfid", "Reconstruction FID") if tokenizer else None,
        _fid_card(samples, "gfid", "Generation FID") if samples else None,
        _loss_card(autoregressive) if autoregressive else None,
        _perplexity_card(tokenizer) if tokenizer else None,
    ]
    return [card for card in cards if card is not None]


def render_card(card: Card) -> Markup:
    """Write a card as HTML."""
    details = ""
    if card.details:
        items = join(
            Markup("<dt>{}</dt><dd>{}</dd>").format(name, value)
            for name, value in card.details.items()
        )
        details = Markup("<dl>{}</dl>").format(items)
    return _CARD.format(
        verdict=card.verdict,
        title=card.title,
        value=card.value,
        unit=card.unit,
        bars=join(_render_bar(bar) for bar in card.bars),
        text=card.text,
        details=details,
    )


def _render_bar(bar: Bar) -> Markup:
    return _BAR.format(
        label=bar.label,
        kind="reference" if bar.is_reference else "",
        percent=f"{100 * min(max(bar.fraction, 0.0), 1.0):.1f}",
        value=bar.value,
    )


def _psnr_card(stage: StageSummary) -> Card | None:
    psnr = stage.number("psnr")
    if psnr is None:
        return None
    baseline = stage.number("psnr_mean_image")
    if baseline is None:
        verdict, text, bars = "neutral", "no mean-image baseline was recorded", []
    else:
        gain = psnr - baseline
        verdict = "good" if gain > 0 else "bad"
        side = "above" if gain > 0 else "not above"
        text = f"{gain:+.1f} dB: {side} the mean image"
        top = max(psnr, baseline)
        bars = [
            Bar(label="tokenizer", value=f"{psnr:.1f}", fraction=psnr / top),
            Bar(
                label="mean image",
                value=f"{baseline:.1f}",
                fraction=baseline / top,
                is_reference=True,
            ),
        ]
    return Card(
        title="Reconstruction PSNR",
        value=format_number(psnr),
        unit="dB",
        verdict=verdict,
        text=text,
        bars=bars,
        details=_details(stage, "psnr", exclude="psnr_mean_image"),
    )


def _fid_card(stage: StageSummary, name: str, title: str) -> Card | None:
    value = stage.number(name)
    if value is None:
        return None
    count = stage.number("images")
    details = {} if count is None else {"images": format_number(int(count))}
    details |= _details(stage, name)
    is_random = any("random" in detail.lower() for detail in details.values())
    return Card(
        title=title,
        value=format_number(value),
        unit={"rfid": "rFID", "gfid": "gFID"}[name],
        verdict="warn" if is_random else "neutral",
        text="random weights: not comparable with published numbers"
        if is_random
        else "lower is better",
        details=details,
    )


def _loss_card(stage: StageSummary) -> Card | None:
    loss = stage.number("validation_loss")
    if loss is None:
        return None
    entropy = mean_over_codebooks(stage, "unigram_entropy")
    if entropy is None:
        verdict, text, bars = "neutral", "no unigram entropy was recorded", []
    else:
        has_learned = loss < entropy
        verdict = "good" if has_learned else "bad"
        text = (
            f"{entropy - loss:.2f} nats below the unigram entropy: context is used"
            if has_learned
            else f"{loss - entropy:.2f} nats above the unigram entropy: no better than code counts"
        )
        top = max(loss, entropy, 1e-9)
        bars = [
            Bar(label="model", value=f"{loss:.2f}", fraction=loss / top),
            Bar(label="unigram", value=f"{entropy:.2f}", fraction=entropy / top, is_reference=True),
        ]
    return Card(
        title="Validation loss",
        value=format_number(loss),
        unit="nats per code",
        verdict=verdict,
        text=text,
        bars=bars,
        details=_details(stage, "validation_loss"),
    )


def _perplexity_card(stage: StageSummary) -> Card | None:
    perplexities = stage.group("perplexity")
    if not perplexities:
        return None
    size = stage.number("codebook_size")
    top = size or max(perplexities.values())
    smallest = min(perplexities.values())
    # Perplexity 1 is a codebook that always answers with one code.
    has_collapsed = smallest < 2
    usage = stage.group("usage")
    details = {f"{humanise(k)} used": f"{100 * value:.1f} %" for k, value in usage.items()}
    return Card(
        title="Codebook perplexity",
        value=" / ".join(format_number(round(value, 1)) for value in perplexities.values()),
        unit="" if size is None else f"of {format_number(int(size))}",
        verdict="bad" if has_collapsed else "good",
        text="a codebook has collapsed to one code"
        if has_collapsed
        else "no codebook has collapsed",
        bars=[
            Bar(label=humanise(name), value=f"{100 * value / top:.0f} %", fraction=value / top)
            for name, value in perplexities.items()
        ],
        details=details,
    )


def _details(stage: StageSummary, name: str, exclude: str | None = None) -> dict[str, str]:
    """Collect the metrics that qualify one, such as `rfid_samples` and `rfid_evaluator`."""
    found: dict[str, str] = {}
    for key, value in stage.metrics.items():
        if key.startswith((f"{name}_", f"{name}.")) and key != exclude:
            found[humanise(key[len(name) + 1 :])] = format_number(value)
    return found
