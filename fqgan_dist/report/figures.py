"""Draw curves (SVG, PNG) and image sheets (PNG)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fqgan_dist.report.curves import Curve, Panel, Reference, arrange_panels, humanise
from fqgan_dist.report.inputs import Images, ReportInputs
from fqgan_dist.telemetry.summary import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Longer curves are drawn as the mean and the range of this many intervals.
MAX_POINTS = 120

# Curves of positive values that span more than this factor get a logarithmic axis.
LOG_SCALE_RATIO = 30.0

_PANEL_INCHES = (4.2, 2.3)
_PNG_COLUMNS = 3
_SHEET_MARGIN, _SHEET_GAP, _SHEET_LABEL_WIDTH = 16, 6, 150


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    text: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme(
    text="#5b6475",
    grid="#e3e7ee",
    lines=("#2f5fe0", "#d9770b", "#0b9468", "#c4388b", "#7546dd", "#5d6b82"),
)
DARK = Theme(
    text="#98a3b8",
    grid="#2a3242",
    lines=("#7aa2ff", "#f2ab4b", "#3fcf9c", "#f07fbc", "#b197fc", "#9aa7bd"),
)


def draw_panel_svg(panel: Panel, theme: Theme) -> bytes:
    """Draw one panel with a transparent background; the same inputs give the same bytes."""
    # A fixed salt and no date: element ids and metadata would differ from run to run otherwise.
    with mpl.rc_context({"svg.hashsalt": "fqgan", "svg.fonttype": "path"}):
        figure = Figure(figsize=_PANEL_INCHES, layout="constrained")
        _draw_panel(figure.add_subplot(), panel, theme)
        output = io.BytesIO()
        figure.savefig(output, format="svg", transparent=True, metadata={"Date": None})
    return output.getvalue()


def draw_panels_png(panels: Sequence[Panel], title: str, *, theme: Theme = LIGHT) -> bytes:
    """Draw a stage's panels, three in a row, on white."""
    num_rows = math.ceil(len(panels) / _PNG_COLUMNS)
    num_columns = min(len(panels), _PNG_COLUMNS)
    width, height = _PANEL_INCHES
    figure = Figure(
        figsize=(width * num_columns, (height + 0.25) * num_rows + 0.4), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        name = f"{panel.group}/{panel.title}" if panel.group else panel.title
        axes.set_title(humanise(name), fontsize=10, loc="left")
        _draw_panel(axes, panel, theme)
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=110, metadata={"Software": None})
    return output.getvalue()


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode one image, (H, W, 3) uint8, without loss."""
    return _save_png(Image.fromarray(image))


def draw_sheet(rows: Mapping[str, Images]) -> bytes:
    """Lay rows of images, each with its label at the left, on a white PNG.

    Each row is (n, H, W, 3) uint8; all rows of one image size, n may differ.
    """
    height, width = next(iter(rows.values())).shape[1:3]
    num_columns = max(len(images) for images in rows.values())
    sheet_width = 2 * _SHEET_MARGIN + _SHEET_LABEL_WIDTH + num_columns * (width + _SHEET_GAP)
    sheet_height = 2 * _SHEET_MARGIN + len(rows) * (height + _SHEET_GAP)
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, (label, images) in enumerate(rows.items()):
        top = _SHEET_MARGIN + row * (height + _SHEET_GAP)
        draw.text((_SHEET_MARGIN, top + height // 2 - 7), label, fill="#20293a", font=font)
        for column, image in enumerate(images):
            left = _SHEET_MARGIN + _SHEET_LABEL_WIDTH + column * (width + _SHEET_GAP)
            sheet.paste(Image.fromarray(image), (left, top))
    return _save_png(sheet)


def render_pngs(inputs: ReportInputs) -> dict[str, bytes]:
    """Draw what the report shows as files: name -> PNG; what the run does not have is left out."""
    files: dict[str, bytes] = {}
    for stage, panels in arrange_panels(inputs).items():
        files[f"curves_{_file_name(stage)}.png"] = draw_panels_png(panels, humanise(stage))
    rows = comparison_rows(inputs)
    if rows:
        files["reconstructions.png"] = draw_sheet(rows)
    if inputs.samples:
        files["samples.png"] = draw_sheet(inputs.samples)
    return files


def comparison_rows(inputs: ReportInputs) -> dict[str, Images]:
    """Name the rows of the comparison: originals, reconstructions, and each codebook alone."""
    rows: dict[str, Images] = {}
    if inputs.originals is not None and len(inputs.originals):
        rows["original"] = inputs.originals
        if inputs.reconstructions is not None:
            rows["reconstruction"] = inputs.reconstructions
        for name, images in inputs.single_codebook.items():
            rows[f"{humanise(name)} only"] = images
    return rows


def _draw_panel(axes: Axes, panel: Panel, theme: Theme) -> None:
    for index, curve in enumerate(panel.curves):
        _draw_curve(axes, curve, theme.lines[index % len(theme.lines)])
    if panel.reference is not None:
        _draw_reference(axes, panel.reference, theme)
    if _needs_log_scale(panel.curves):
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _style_axes(axes, theme)


def _draw_reference(axes: Axes, reference: Reference, theme: Theme) -> None:
    axes.axhline(reference.value, color=theme.text, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{reference.label} {format_number(reference.value)}",
        xy=(0.99, reference.value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=theme.text,
    )


def _style_axes(axes: Axes, theme: Theme) -> None:
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.1)
    axes.tick_params(which="both", labelsize=8, length=0, labelcolor=theme.text)
    axes.set_xlabel("step", fontsize=8, color=theme.text)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            fontsize=8, frameon=False, labelcolor=theme.text, handlelength=1.4, borderaxespad=0.2
        )


def _draw_curve(axes: Axes, curve: Curve, color: str) -> None:
    label = f"{curve.label} {format_number(curve.values[-1])}" if curve.label else None
    steps, means, lows, highs = _summarise(curve)
    marker = "o" if len(steps) <= 12 else None
    axes.plot(steps, means, color=color, linewidth=1.8, label=label, marker=marker, markersize=3.5)
    if len(curve.steps) > MAX_POINTS:
        axes.fill_between(steps, lows, highs, color=color, alpha=0.18, linewidth=0)


def _summarise(curve: Curve) -> tuple[NDArray[np.float64], ...]:
    """Reduce a curve to at most MAX_POINTS intervals: mean step, mean, minimum, maximum."""
    count = min(len(curve.steps), MAX_POINTS)
    steps = np.array_split(np.asarray(curve.steps, dtype=np.float64), count)
    values = np.array_split(np.asarray(curve.values, dtype=np.float64), count)
    return (
        np.array([part.mean() for part in steps]),
        np.array([part.mean() for part in values]),
        np.array([part.min() for part in values]),
        np.array([part.max() for part in values]),
    )


def _needs_log_scale(curves: Sequence[Curve]) -> bool:
    values = [value for curve in curves for value in curve.values]
    return min(values) > 0 and max(values) / min(values) > LOG_SCALE_RATIO


def _file_name(name: str) -> str:
    # Stage names come from a summary.json: nothing of them may become another path.
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in name)


def _save_png(image: Image.Image) -> bytes:
    output = io.BytesIO()
    image.save(output, format="PNG", optimize=True)
    return output.getvalue()
