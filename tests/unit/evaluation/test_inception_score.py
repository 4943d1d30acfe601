from __future__ import annotations

import math

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from fqgan_dist.evaluation.inception_score import compute_inception_score


def draw_logits(count: int) -> torch.Tensor:
    return torch.randn(count, 1008, generator=torch.Generator().manual_seed(0)) * 3


def test_equals_torch_fidelity():
    logits = draw_logits(600)
    expected = isc_features_to_metric(logits, splits=3, shuffle=False)
    score = compute_inception_score(logits, split_size=200)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-8)


def test_equal_images_score_one():
    assert compute_inception_score(draw_logits(1).expand(50, -1)).mean == pytest.approx(1.0)


def test_sure_and_different_images_score_their_number_of_classes():
    logits = torch.eye(10, 1008).repeat(5, 1) * 1e4  # probabilities underflow to exactly 0
    assert compute_inception_score(logits).mean == pytest.approx(10.0)


def test_order_by_class_lowers_the_score_of_splits():
    logits = torch.eye(10, 1008).repeat_interleave(10, dim=0) * 50
    ordered = compute_inception_score(logits, split_size=20).mean
    mixed = compute_inception_score(
        logits[torch.randperm(100, generator=torch.Generator().manual_seed(0))], split_size=20
    ).mean
    assert ordered == pytest.approx(2.0)
    assert mixed > 4


def test_a_smaller_last_split_counts():
    logits = draw_logits(250)
    whole, rest = (compute_inception_score(part).mean for part in logits.split(200))
    score = compute_inception_score(logits, split_size=200)
    assert score.mean == pytest.approx((whole + rest) / 2)
    assert math.isclose(score.std, abs(whole - rest) / 2)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="n > 0"):
        compute_inception_score(torch.zeros(0, 1008))
    with pytest.raises(ValueError, match="split_size: 0"):
        compute_inception_score(draw_logits(5), split_size=0)
