from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fqgan_dist.report.inputs import ReportInputs


def build_inputs(**parts: Any) -> ReportInputs:
    required = {"run_name": "run", "summary": {}, "config_yaml": "", "environment": {}}
    return ReportInputs(**(required | parts))


def images(count: int = 2, size: int = 8, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros((count, size, size, 3), dtype)


@pytest.mark.parametrize(
    "parts",
    [
        {"originals": images(dtype=np.float32)},
        {"originals": images()[0]},
        {"samples": {"cat": images()[..., :1]}},
    ],
)
def test_images_of_another_form_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected \(n, H, W, 3\) uint8"):
        build_inputs(**parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"reconstructions": images()},
        {"originals": images(2), "reconstructions": images(3)},
        {"originals": images(size=8), "single_codebook": {"visual": images(size=16)}},
    ],
)
def test_images_that_do_not_belong_to_the_originals_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected originals'"):
        build_inputs(**parts)


def test_samples_of_several_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="image sizes differ"):
        build_inputs(samples={"a": images(size=8), "b": images(size=16)})


def test_codebook_names_come_from_images_and_perplexities() -> None:
    inputs = build_inputs(
        summary={"tokenizer": {"metrics": {"perplexity": {"visual": 2.0, "semantic_mid": 3.0}}}},
        originals=images(),
        single_codebook={"visual": images()},
    )
    assert inputs.codebook_names == ["visual", "semantic_mid"]
