from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fqgan_dist.tokenizer import entropy
from fqgan_dist.tokenizer.entropy import entropy_loss


def unit_vectors(count: int, *, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain_entropy_loss(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Write the released formula down, whole matrices and distances included."""
    distances = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1)
    affinities = -(distances - 2 * vectors @ codebook.T) / 0.01
    probability = affinities.softmax(dim=1)
    sample_entropy = -(probability * (affinities + 1e-5).log_softmax(dim=1)).sum(dim=1).mean()
    mean = probability.mean(dim=0)
    return sample_entropy + (mean * (mean + 1e-5).log()).sum()


def compute(
    loss_fn: Callable[[Tensor, Tensor], Tensor], vectors: Tensor, codebook: Tensor
) -> tuple[float, Tensor]:
    """Value and gradients behind the normalization that always comes first."""
    leaves = [each.clone().requires_grad_() for each in (vectors, codebook)]
    loss = loss_fn(*(F.normalize(each, dim=1) for each in leaves))
    (3 * loss).backward()
    return loss.item(), torch.cat([each.grad for each in leaves]).double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_value_and_gradients_are_the_plain_formula_in_float64(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy, "rows_per_block", lambda *_: block)
    # Clustered, so that many codes share the probability and fp32 rounding is not blown up.
    center = unit_vectors(1, seed=0)
    vectors = F.normalize(center + 0.2 * unit_vectors(40, seed=1), dim=1)
    codebook = F.normalize(center + 0.2 * unit_vectors(90, seed=2), dim=1)
    loss, gradients = compute(entropy_loss, vectors, codebook)
    expected, wanted = compute(plain_entropy_loss, vectors.double(), codebook.double())
    assert loss == pytest.approx(expected, rel=1e-5)
    # An affinity of 200 rounds by 1e-5 in fp32.
    assert relative_error(gradients, wanted) < 5e-5


@pytest.mark.parametrize("seed", [3, 13, 23, 33])
def test_gradients_round_no_worse_than_the_plain_formula_in_float32(seed: int) -> None:
    # Spread out, one code dominates and what is left of its gradient is a small difference.
    vectors, codebook = unit_vectors(16, seed=seed), unit_vectors(64, seed=seed + 1)
    exact = compute(plain_entropy_loss, vectors.double(), codebook.double())[1]
    plain = relative_error(compute(plain_entropy_loss, vectors, codebook)[1], exact)
    assert relative_error(compute(entropy_loss, vectors, codebook)[1], exact) < 1.5 * plain


def test_uniform_use_of_sharp_assignments_reaches_minus_log_v() -> None:
    codebook = torch.eye(8)
    # eps inside the logarithm makes the average's entropy slightly smaller.
    assert entropy_loss(codebook, codebook).item() == pytest.approx(-math.log(8), abs=1e-3)


def test_single_used_code_gives_zero() -> None:
    codebook = torch.eye(8)
    assert entropy_loss(codebook[:1].repeat(5, 1), codebook).item() == pytest.approx(0, abs=1e-4)


def test_no_vector_by_code_matrix_is_kept_for_the_backward_pass() -> None:
    vectors = unit_vectors(2000, seed=5).requires_grad_()
    codebook = unit_vectors(3000, seed=6).requires_grad_()
    kept: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        entropy_loss(vectors, codebook)
    assert 0 < sum(kept) < 0.02 * 2000 * 3000


def test_autocast_does_not_change_the_loss() -> None:
    vectors, codebook = unit_vectors(50, seed=7), unit_vectors(60, seed=8)
    expected = entropy_loss(vectors, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = entropy_loss(vectors, codebook)
    assert torch.equal(found, expected)
