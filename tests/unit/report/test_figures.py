from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from fqgan_dist.report.curves import Curve, Panel, Reference
from fqgan_dist.report.figures import (
    DARK,
    LIGHT,
    comparison_rows,
    draw_panel_svg,
    draw_panels_png,
    draw_sheet,
    encode_png,
    render_pngs,
)
from fqgan_dist.report.inputs import ReportInputs


def build_panel(num_steps: int = 5, scale: float = 1.0) -> Panel:
    steps = list(range(1, num_steps + 1))
    curves = [
        Curve("visual", steps, [scale / step for step in steps]),
        Curve("semantic", steps, [2 * scale / step for step in steps]),
    ]
    return Panel("tokenizer", "loss", "commitment", curves, Reference("mean image", 0.5))


def decode(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def random_images(count: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_a_drawing_is_valid_svg_in_the_colours_of_its_theme() -> None:
    for theme in (LIGHT, DARK):
        svg = draw_panel_svg(build_panel(), theme)
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert theme.lines[0].encode() in svg
        assert theme.lines[1].encode() in svg


def test_the_same_panel_gives_the_same_bytes() -> None:
    assert draw_panel_svg(build_panel(), LIGHT) == draw_panel_svg(build_panel(), LIGHT)


def test_long_curves_do_not_make_large_files() -> None:
    short, long = (len(draw_panel_svg(build_panel(n), LIGHT)) for n in (120, 50_000))
    assert long < 2.5 * short


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-1.0, 1000.0], [1e-6, 1e6]])
def test_awkward_values_can_be_drawn(values: list[float]) -> None:
    curve = Curve("", list(range(len(values))), values)
    assert b"<path" in draw_panel_svg(Panel("stage", "", "metric", [curve]), LIGHT)


def test_a_wide_positive_range_gets_a_logarithmic_axis() -> None:
    # Equal factors are equal distances there; on a linear axis equal differences are.
    wide = Panel("s", "", "m", [Curve("", [1, 2, 3], [1.0, 100.0, 10_000.0])])
    narrow = Panel("s", "", "m", [Curve("", [1, 2, 3], [1.0, 2.0, 3.0])])
    for panel in (wide, narrow):
        first, second = line_rises(panel)
        assert first == pytest.approx(second, rel=1e-3)


def line_rises(panel: Panel) -> list[float]:
    root = ElementTree.fromstring(draw_panel_svg(panel, LIGHT))
    namespace = "{http://www.w3.org/2000/svg}"
    paths = [
        path.get("d", "")
        for path in root.iter(f"{namespace}path")
        if LIGHT.lines[0] in path.get("style", "") and "clip-path" in path.attrib
    ]
    numbers = [float(word) for word in paths[0].split() if word not in "MLz"]
    heights = numbers[1::2]
    return [high - low for high, low in itertools.pairwise(heights)]


def test_a_sheet_holds_every_image_unchanged() -> None:
    rows = {"original": random_images(3), "reconstruction": random_images(3)[::-1]}
    sheet = decode(draw_sheet(rows))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (8, 8, 3))[:, :, 0]
    for images in rows.values():
        for image in images:
            assert (windows == image).all(axis=(-1, -2, -3)).any()


def test_png_keeps_every_pixel() -> None:
    image = random_images(1)[0]
    np.testing.assert_array_equal(decode(encode_png(image)), image)


def build_inputs() -> ReportInputs:
    return ReportInputs(
        run_name="run",
        summary={},
        config_yaml="",
        environment={},
        metrics={"tokenizer/../x": [{"step": 1, "tokenizer/loss/total": 1.0}], "shards": []},
        originals=random_images(2),
        reconstructions=random_images(2),
        single_codebook={"semantic_mid": random_images(2)},
        samples={"cat": random_images(3), "dog": random_images(1)},
    )


def test_files_have_harmless_names_and_are_pngs() -> None:
    files = render_pngs(build_inputs())
    assert list(files) == ["curves_tokenizer____x.png", "reconstructions.png", "samples.png"]
    for png in files.values():
        assert len(np.unique(decode(png))) > 10


def test_nothing_is_drawn_of_an_empty_run() -> None:
    empty = ReportInputs(run_name="run", summary={}, config_yaml="", environment={})
    assert render_pngs(empty) == {}


def test_rows_of_the_comparison_are_named() -> None:
    rows = comparison_rows(build_inputs())
    assert list(rows) == ["original", "reconstruction", "semantic mid only"]


def test_many_panels_fit_on_one_png() -> None:
    one = decode(draw_panels_png([build_panel()], "tokenizer")).shape
    seven = decode(draw_panels_png([build_panel()] * 7, "tokenizer")).shape
    assert seven[0] > 2 * one[0]
    assert seven[1] == pytest.approx(3 * one[1], abs=3)
