from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fqgan_dist.autoregressive.filtering import invert_cumulative, keep_top_k, keep_top_p


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(6, 40, dtype=torch.float64)


def kept_codes(filtered: Tensor, logits: Tensor) -> list[set[int]]:
    kept = filtered.isfinite()
    assert filtered[kept].equal(logits[kept])
    return [set(row.nonzero()[:, 0].tolist()) for row in kept]


def top_p_slowly(logits: list[float], top_p: float) -> set[int]:
    weights = [torch.tensor(x, dtype=torch.float64).exp().item() for x in logits]
    total, kept, mass = sum(weights), set(), 0.0
    for code in sorted(range(len(logits)), key=lambda code: -logits[code]):
        kept.add(code)
        mass += weights[code] / total
        if mass > top_p:
            break
    return kept


@pytest.mark.parametrize("top_k", [1, 2, 7, 40])
def test_top_k_keeps_the_k_largest(logits: Tensor, top_k: int):
    expected = [set(sorted(range(40), key=lambda c: -row[c])[:top_k]) for row in logits.tolist()]
    assert kept_codes(keep_top_k(logits, top_k), logits) == expected


def test_top_k_keeps_all_that_equal_the_last_kept():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert kept_codes(keep_top_k(logits, 2), logits) == [{1, 2, 3}]


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_likeliest_up_to_the_one_that_crosses(logits: Tensor, top_p: float):
    expected = [top_p_slowly(row, top_p) for row in logits.tolist()]
    assert kept_codes(keep_top_p(logits, top_p), logits) == expected


def test_top_p_counts_probabilities_after_top_k(logits: Tensor):
    filtered = keep_top_p(keep_top_k(logits, 5), 0.6)
    for row, kept in zip(logits.tolist(), kept_codes(filtered, logits), strict=True):
        five = sorted(range(40), key=lambda code: -row[code])[:5]
        assert kept == {five[i] for i in top_p_slowly([row[code] for code in five], 0.6)}


def test_inverse_is_the_first_code_whose_cumulative_exceeds_the_uniform():
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999], dtype=torch.float64)
    assert invert_cumulative(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_inverse_never_draws_an_impossible_code():
    probabilities = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.3, 0.0], [0.0, 1.5, 0.0]])
    for uniform in (0.0, 1 - 2**-53):
        uniforms = torch.full((3,), uniform, dtype=torch.float64)
        assert invert_cumulative(probabilities, uniforms).tolist() == [1, 1, 1]


def test_inverse_needs_no_normalisation():
    torch.manual_seed(0)
    weights, uniforms = torch.rand(50, 30), torch.rand(50, dtype=torch.float64)
    drawn = invert_cumulative(weights, uniforms)
    assert drawn.equal(invert_cumulative(4 * weights, uniforms))
    assert len(drawn.unique()) > 10
