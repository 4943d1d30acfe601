"""Build the report: one HTML page that needs no other file, no network and no script."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from markupsafe import Markup

from fqgan_dist.report.cards import build_cards, render_card
from fqgan_dist.report.curves import Panel, arrange_panels, humanise
from fqgan_dist.report.figures import DARK, LIGHT, comparison_rows, draw_panel_svg, encode_png
from fqgan_dist.report.html import image, join, picture, section
from fqgan_dist.report.inputs import Images, ReportInputs
from fqgan_dist.telemetry.summary import Metric, StageSummary, format_number, format_seconds

COMPARISON_COLUMNS = 8
# Images smaller than this are shown with hard pixel edges: smoothing would hide what they are.
PIXELATED_BELOW = 128

# Names in a report come from datasets and buckets. Everything is escaped; should something slip
# through all the same, this policy lets no script run and nothing load.
_CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"

_STYLE_SHEET = resources.files("fqgan_dist.report").joinpath("style.css").read_text("utf-8")

_PAGE = Markup(
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>'
    "<body>{header}{navigation}<main>{sections}</main>"
    "<footer>Written by fqgan_dist. This page is self-contained: it loads nothing and runs no "
    "script.</footer></body></html>\n"
)

_HEADER = Markup(
    '<header><p class="eyebrow">FQGAN run report</p><h1>{name}</h1>'
    '<ul class="facts">{facts}</ul>{notes}</header>'
)

_PILL_KINDS = {"done": "good", "skipped": "neutral", "failed": "bad", "started": "warn"}

_YAML_LINE = re.compile(r"^(?P<indent>\s*(?:- )*)(?P<key>[^\s#'\"][^:#]*:)(?P<rest>(?: .*)?)$")


def build_report(inputs: ReportInputs) -> str:
    """Build the page; sections without content are left out."""
    sections = {
        anchor: (title, section(anchor, title, lead, body))
        for anchor, title, lead, body in _build_sections(inputs)
        if body
    }
    links = join(
        Markup('<li><a href="#{}">{}</a></li>').format(anchor, title)
        for anchor, (title, _) in sections.items()
    )
    page = _PAGE.format(
        policy=_CONTENT_POLICY,
        title=f"{inputs.run_name} - FQGAN run report",
        style=Markup(_STYLE_SHEET),
        header=_build_header(inputs),
        navigation=Markup("<nav><ul>{}</ul></nav>").format(links),
        sections=join(html for _, html in sections.values()),
    )
    # A plain str: Markup would escape what a caller adds to it, or searches in it.
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(page))


# Control characters and marks of direction, by which a name could show as another one.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def _build_sections(inputs: ReportInputs) -> Iterator[tuple[str, str, str, Markup]]:
    stages = inputs.stages
    yield "results", "Results", "What the run reached.", _build_cards(stages)
    yield "stages", "Stages", "What ran, for how long, and what came out.", _build_stages(stages)
    yield (
        "reconstructions",
        "Reconstructions",
        "Validation images, what the tokenizer makes of them, and what each codebook holds alone: "
        "the other codebooks' vectors are zeros before the decoder (FQGAN, Fig. 3).",
        _build_comparison(comparison_rows(inputs)),
    )
    yield (
        "samples",
        "Samples",
        "Images generated from a class label.",
        _build_samples(inputs.samples),
    )
    yield (
        "curves",
        "Curves",
        "Metrics over optimizer steps. Long curves show the mean and the range of intervals.",
        _build_curves(arrange_panels(inputs)),
    )
    yield (
        "others",
        "Other records",
        "What the run also holds, made from other settings; the inputs that differ from those "
        "shown here, and the results.",
        _build_others(stages),
    )
    yield (
        "configuration",
        "Configuration",
        "The resolved settings of the run.",
        _build_configuration(inputs.config_yaml),
    )
    yield (
        "environment",
        "Environment",
        "Software and hardware that the run used.",
        _build_environment(inputs.environment),
    )


def _build_header(inputs: ReportInputs) -> Markup:
    notes = Markup("")
    if inputs.notes:
        items = join(Markup("<li>{}</li>").format(note) for note in inputs.notes)
        notes = Markup(
            '<div class="notes" role="note"><strong>Read this first</strong><ul>{}</ul></div>'
        ).format(items)
    facts = join(
        Markup("<li>{} <b>{}</b></li>").format(name, value)
        for name, value in _find_facts(inputs).items()
    )
    return _HEADER.format(name=inputs.run_name, facts=facts, notes=notes)


def _find_facts(inputs: ReportInputs) -> dict[str, str]:
    stages = list(inputs.stages.values())
    facts: dict[str, str] = {}
    if stages:
        finished = sum(stage.state in ("done", "skipped") for stage in stages)
        facts["stages finished"] = f"{finished} of {len(stages)}"
        facts["time"] = format_seconds(sum(stage.seconds or 0.0 for stage in stages))
    environment = inputs.environment
    git = environment.get("git")
    if isinstance(git, Mapping):
        changed = " (modified)" if git.get("modified") else ""
        facts["commit"] = str(git.get("commit"))[:10] + changed
    gpus = environment.get("gpus") or []
    if gpus:
        facts["GPUs"] = f"{len(gpus)} x {gpus[0].get('name')}"
    elif environment.get("cpu_count"):
        facts["CPU cores"] = str(environment["cpu_count"])
    if environment.get("torch"):
        facts["torch"] = str(environment["torch"])
    return facts


def _build_cards(stages: Mapping[str, StageSummary]) -> Markup:
    cards = build_cards(stages)
    if not cards:
        return Markup("")
    return Markup('<div class="cards">{}</div>').format(join(map(render_card, cards)))


def _build_stages(stages: Mapping[str, StageSummary]) -> Markup:
    if not stages:
        return Markup("")
    longest = max((stage.seconds or 0.0 for stage in stages.values()), default=0.0) or 1.0
    rows = join(_build_stage_row(stage, longest) for stage in stages.values())
    return Markup(
        '<div class="scroll"><table class="stages"><thead><tr><th>Stage</th><th>State</th>'
        "<th>Time</th><th>Metrics</th></tr></thead><tbody>{}</tbody></table></div>"
    ).format(rows)


def _build_others(stages: Mapping[str, StageSummary]) -> Markup:
    rows = join(
        Markup(
            '<tr><td class="stage">{}</td><td><div class="chips">{}</div></td>'
            '<td><div class="chips">{}</div></td></tr>'
        ).format(
            humanise(stage.name),
            # As they are written in a config: whoever wants this record types them.
            _build_chips(other.inputs, lambda name: name.removeprefix("settings.")),
            _build_chips(other.metrics),
        )
        for stage in stages.values()
        for other in stage.others
    )
    if not rows:
        return Markup("")
    return Markup(
        '<div class="scroll"><table class="stages"><thead><tr><th>Stage</th><th>Made from</th>'
        "<th>Metrics</th></tr></thead><tbody>{}</tbody></table></div>"
    ).format(rows)


def _build_chips(values: Mapping[str, Metric], label_fn: Callable[[str], str] = humanise) -> Markup:
    return join(
        Markup("<span>{} <b>{}</b></span>").format(label_fn(name), format_number(value))
        for name, value in values.items()
    )


def _build_stage_row(stage: StageSummary, longest: float) -> Markup:
    return Markup(
        '<tr><td class="stage">{name}</td><td><span class="pill {kind}">{state}</span></td>'
        '<td class="time">{time}<span class="bar-track"><span class="bar-fill" '
        'style="width:{percent}%"></span></span></td><td><div class="chips">{chips}</div></td></tr>'
    ).format(
        name=humanise(stage.name),
        kind=_PILL_KINDS.get(stage.state, "neutral"),
        state=stage.state,
        time=format_seconds(stage.seconds),
        percent=f"{100 * (stage.seconds or 0.0) / longest:.1f}",
        chips=_build_chips(stage.metrics),
    )


def _build_comparison(rows: Mapping[str, Images]) -> Markup:
    if not rows:
        return Markup("")
    count = len(next(iter(rows.values())))
    return join(
        _build_plate(rows, range(start, min(start + COMPARISON_COLUMNS, count)))
        for start in range(0, count, COMPARISON_COLUMNS)
    )


def _build_plate(rows: Mapping[str, Images], columns: range) -> Markup:
    cells: list[Markup] = []
    for label, images in rows.items():
        cells.append(Markup('<span class="row-label">{}</span>').format(label))
        cells += [_show(images[i], f"{label}, image {i + 1}") for i in columns]
    size = next(iter(rows.values())).shape[1]
    # All plates have the same columns, so that images keep their size in the last one.
    return Markup(
        '<div class="plate {kind}"><div class="comparison" style="grid-template-columns:'
        '118px repeat({count}, minmax(64px, 1fr))">{cells}</div></div>'
    ).format(kind=_pixelated(size), count=COMPARISON_COLUMNS, cells=_pad_rows(cells, len(columns)))


def _pad_rows(cells: Sequence[Markup], num_images: int) -> Markup:
    padding = [Markup("<span></span>")] * (COMPARISON_COLUMNS - num_images)
    width = num_images + 1
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return join(cell for row in rows for cell in [*row, *padding])


def _build_samples(samples: Mapping[str, Images]) -> Markup:
    figures = [
        Markup(
            '<figure class="class {kind}"><figcaption>{name}</figcaption>'
            "<div>{images}</div></figure>"
        ).format(
            kind=_pixelated(images.shape[1]),
            name=name,
            images=join(
                _show(pixels, f"sample {i + 1} of {name}") for i, pixels in enumerate(images)
            ),
        )
        for name, images in samples.items()
    ]
    return Markup('<div class="classes">{}</div>').format(join(figures)) if figures else Markup("")


def _show(pixels: np.ndarray[Any, np.dtype[np.uint8]], alt: str) -> Markup:
    return image(encode_png(pixels), alt, width=pixels.shape[1], height=pixels.shape[0])


def _pixelated(size: int) -> str:
    return "pixelated" if size < PIXELATED_BELOW else ""


def _build_curves(arranged: Mapping[str, Sequence[Panel]]) -> Markup:
    parts: list[Markup] = []
    for stage, panels in arranged.items():
        figures = join(map(_build_panel, panels))
        heading = humanise(stage)
        parts.append(Markup('<h4>{}</h4><div class="panels">{}</div>').format(heading, figures))
    return join(parts)


def _build_panel(panel: Panel) -> Markup:
    last = format_number(panel.curves[0].values[-1]) if len(panel.curves) == 1 else ""
    name = humanise(panel.title)
    return Markup(
        '<figure class="panel"><figcaption><span><span class="group">{group}</span>{name}</span>'
        '<span class="last">{last}</span></figcaption>{drawing}</figure>'
    ).format(
        group=f"{humanise(panel.group)} / " if panel.group else "",
        name=name,
        last=last,
        drawing=picture(
            draw_panel_svg(panel, LIGHT), draw_panel_svg(panel, DARK), f"{name} over steps"
        ),
    )


def _build_configuration(config_yaml: str) -> Markup:
    if not config_yaml.strip():
        return Markup("")
    lines = Markup("\n").join(_highlight(line) for line in config_yaml.rstrip().split("\n"))
    return Markup('<div class="scroll"><pre>{}</pre></div>').format(lines)


def _highlight(line: str) -> Markup:
    if line.lstrip().startswith("#"):
        return Markup('<span class="comment">{}</span>').format(line)
    match = _YAML_LINE.match(line)
    if match is None:
        return Markup("{}").format(line)
    return Markup('{}<span class="key">{}</span>{}').format(*match.group("indent", "key", "rest"))


def _build_environment(environment: Mapping[str, Any]) -> Markup:
    if not environment:
        return Markup("")
    rows = join(
        Markup("<tr><td>{}</td><td>{}</td></tr>").format(humanise(name), _show_value(value))
        for name, value in environment.items()
    )
    return Markup('<div class="scroll"><table class="environment">{}</table></div>').format(rows)


def _show_value(value: Any) -> Markup:
    """Show a scalar as text, a mapping as name and value pairs, a list as one line per item."""
    match value:
        case None | []:
            return Markup("-")
        case Mapping():
            pairs = join(
                Markup("<span>{} <b>{}</b></span>").format(name, "-" if item is None else item)
                for name, item in value.items()
            )
            return Markup('<div class="chips">{}</div>').format(pairs)
        case list():
            return join(map(_show_value, value))
        case _:
            return Markup("<div>{}</div>").format(value)
