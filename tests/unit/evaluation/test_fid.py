from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from fqgan_dist.evaluation.fid import frechet_distance
from fqgan_dist.evaluation.moments import Moments, compute_moments


def draw_features(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return noise @ mixing / width**0.5 + shift


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(compute_moments(a), compute_moments(b))


def library_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    statistics = fid_features_to_statistics(a), fid_features_to_statistics(b)
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_equals_torch_fidelity_on_full_rank_features():
    a, b = draw_features(400, 64, 0), draw_features(300, 64, 1, shift=0.3)
    assert distance(a, b) == pytest.approx(library_distance(a, b), rel=1e-6)


def test_equals_matrix_square_root_on_full_rank_features():
    a = compute_moments(draw_features(400, 64, 0))
    b = compute_moments(draw_features(300, 64, 1, shift=0.3))
    root = sqrtm(a.covariance @ b.covariance)
    expected = (
        np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_a", "num_b"), [(20, 30), (30, 300), (300, 20)])
def test_equals_eigenvalues_of_the_product_on_singular_covariances(num_a: int, num_b: int):
    a, b = draw_features(num_a, 64, 0), draw_features(num_b, 64, 1, shift=0.3)
    # 1e-6, since the eigenvalues of the product carry noise in the null directions, ours do not.
    assert distance(a, b) == pytest.approx(library_distance(a, b), rel=1e-6)


def test_constant_features_do_not_break_the_factorisation():
    a, b = draw_features(300, 32, 0), draw_features(300, 32, 1)
    a[:, 5:9] = 0.0
    b[:, 5:9] = 0.0
    kept = [i for i in range(32) if not 5 <= i < 9]
    assert distance(a, b) == pytest.approx(distance(a[:, kept], b[:, kept]), rel=1e-9)


def test_equals_the_closed_form_for_isotropic_gaussians():
    width = 8
    a = Moments(101, np.zeros(width), np.eye(width) * 100 * 4.0)
    b = Moments(201, np.full(width, 0.5), np.eye(width) * 200 * 9.0)
    # Per dimension: squared difference of the deviations (2 and 3) and of the means (0 and 0.5).
    assert frechet_distance(a, b) == pytest.approx(width * 1.25, rel=1e-12)


@pytest.mark.parametrize("count", [30, 300])
def test_is_zero_for_equal_sets_and_never_negative(count: int):
    features = draw_features(count, 64, 0)
    value = distance(features, features)
    assert 0.0 <= value < 1e-6 * features.var(dim=0).sum().item()


@pytest.mark.parametrize(("num_a", "num_b"), [(300, 300), (20, 300), (20, 20)])
def test_is_symmetric(num_a: int, num_b: int):
    a, b = draw_features(num_a, 64, 0), draw_features(num_b, 64, 1, shift=0.3)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


def test_dropping_a_part_or_swapping_in_another_set_changes_it():
    a, b, c = (draw_features(400, 32, seed) for seed in range(3))
    assert abs(distance(a, b) - distance(a[64:], b)) > 1e-3
    assert abs(distance(a, b) - distance(a, c)) > 1e-3


def test_different_widths_are_refused():
    with pytest.raises(ValueError, match="widths 8 and 9"):
        distance(draw_features(20, 8, 0), draw_features(20, 9, 1))


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        distance(draw_features(1, 8, 0), draw_features(20, 8, 1))
