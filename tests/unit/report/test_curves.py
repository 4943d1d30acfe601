from __future__ import annotations

from typing import Any

import pytest

from fqgan_dist.report.curves import Panel, Reference, arrange_panels, humanise
from fqgan_dist.report.inputs import ReportInputs


def arrange(
    metrics: dict[str, list[dict[str, Any]]], summary: dict[str, Any] | None = None
) -> dict[str, list[Panel]]:
    perplexity = {"visual": 3.0, "semantic_mid": 4.0, "mid": 5.0}
    return arrange_panels(
        ReportInputs(
            run_name="run",
            summary=summary or {"tokenizer": {"metrics": {"perplexity": perplexity}}},
            config_yaml="",
            environment={},
            metrics=metrics,
        )
    )


@pytest.mark.parametrize("separator", ["/", "_", "."])
def test_codebooks_of_a_metric_share_a_panel(separator: str) -> None:
    names = [
        f"tokenizer/loss/commitment{separator}{codebook}" for codebook in ("semantic_mid", "visual")
    ]
    (panel,) = arrange({"tokenizer": [{"step": 1, names[0]: 1.0, names[1]: 2.0}]})["tokenizer"]
    assert (panel.group, panel.title) == ("loss", "commitment")
    # In config order, whatever order the records have.
    assert [(curve.label, curve.values) for curve in panel.curves] == [
        ("visual", [2.0]),
        ("semantic_mid", [1.0]),
    ]


def test_the_mean_over_codebooks_comes_before_them() -> None:
    record = {"step": 1, "tokenizer/loss/entropy/visual": 1.0, "tokenizer/loss/entropy": 2.0}
    (panel,) = arrange({"tokenizer": [record]})["tokenizer"]
    assert [curve.label for curve in panel.curves] == ["", "visual"]


def test_other_metrics_have_a_panel_each() -> None:
    records = [{"step": 1, "images_seen": 8, "time": 0.0, "tokenizer/loss/total": 1.0}]
    records += [{"step": 2, "train/images_per_s": 9.0}]
    panels = arrange({"tokenizer": records})["tokenizer"]
    assert [(panel.group, panel.title) for panel in panels] == [
        ("loss", "total"),
        ("train", "images_per_s"),
    ]
    assert panels[1].curves[0].steps == [2]


def test_metrics_without_a_finite_value_have_no_panel() -> None:
    assert arrange({"tokenizer": [{"step": 1, "tokenizer/loss/total": None}]}) == {}


def test_the_validation_loss_is_compared_with_the_mean_unigram_entropy() -> None:
    panels = arrange(
        {"autoregressive": [{"step": 1, "autoregressive/validation/loss": 4.0}]},
        {"autoregressive": {"metrics": {"unigram_entropy": {"visual": 5.0, "semantic": 6.0}}}},
    )
    assert panels["autoregressive"][0].reference == Reference("unigram entropy", 5.5)


def test_psnr_is_compared_with_the_mean_image() -> None:
    panels = arrange(
        {"tokenizer": [{"step": 1, "tokenizer/validation/psnr": 19.0, "tokenizer/loss/x": 1.0}]},
        {"tokenizer": {"metrics": {"psnr_mean_image": 12.0}}},
    )
    assert [panel.reference for panel in panels["tokenizer"]] == [
        Reference("mean image", 12.0),
        None,
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images_per_s", "images per second"),
        ("step_ms", "step (ms)"),
        ("gpu_peak_gib", "gpu peak (GiB)"),
        ("semantic_mid", "semantic mid"),
        ("loss/total", "loss / total"),
    ],
)
def test_names_are_written_for_people(name: str, text: str) -> None:
    assert humanise(name) == text
