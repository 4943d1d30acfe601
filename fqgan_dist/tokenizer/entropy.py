"""The entropy loss of a codebook, without ever holding the (N, V) matrix of affinities.

Letters: N vectors (images x positions), V codebook size, D code dim.
Source: reference/fqgan.md, section 1.4; values and gradients are those of the released code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.tokenizer.precision import full_precision, rows_per_block

COSINE_SCALE = 200.0
"""Affinity per unit of cosine: -distance / 0.01, where unit vectors' distance is 2 - 2 cosine."""
LOG_EPS = 1e-5
"""Added to the mean probability inside its logarithm; moves the loss by 1e-3, relative."""

LOWEST_LOG_PROBABILITY = -80.0
"""Below e^-80 nothing adds up to an fp32 digit; exp of what underflows is 15 times slower."""


def entropy_loss(vectors: Tensor, codebook: Tensor, loss_group: LossGroup = ALONE) -> Tensor:
    """Make assignments sharp for each vector and spread over the codebook for all of them.

    With p the softmax over codes of 200 * cosine: the mean over vectors of p's entropy, minus the
    entropy of p's mean over vectors. Natural logarithms; usually negative, at least -log V.

    Args:
        vectors: unit vectors, (N, D) float32.
        codebook: unit codes, (V, D) float32.
        loss_group: the ranks over whose vectors p is averaged; the first mean is over this rank's.

    Returns:
        Scalar, float32. Memory is O(N + V) beside one block of rows, in both directions.

    Source: the entropy penalty of FQGAN's training scripts (not in the paper); unweighted here.
    """
    return _EntropyLoss.apply(vectors, codebook, loss_group)


class _EntropyLoss(torch.autograd.Function):
    """The affinities are computed block by block, and once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, codebook: Tensor, loss_group: LossGroup) -> Tensor:
        entropies = vectors.new_empty(len(vectors))
        mean_probability = vectors.new_zeros(len(codebook))
        with full_precision(vectors.device):
            for rows in _blocks(vectors, codebook):
                log_probability = _log_probabilities(vectors[rows], codebook)
                probability = log_probability.exp()
                mean_probability += probability.sum(dim=0)
                entropies[rows] = probability.mul_(log_probability).sum(dim=1).neg_()
            # Averaged over the group before the logarithm, which is not linear: the mean of the
            # ranks' losses would be another loss.
            mean_probability = loss_group.mean(mean_probability / len(vectors))
            mean_entropy = -(mean_probability * (mean_probability + LOG_EPS).log()).sum()
        ctx.save_for_backward(vectors, codebook, entropies, mean_probability)
        return entropies.mean() - mean_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] torch: (ctx, *grads)
        vectors, codebook, entropies, mean_probability = ctx.saved_tensors
        grad_vectors = torch.empty_like(vectors)
        grad_codebook = torch.zeros_like(codebook)
        shifted = mean_probability + LOG_EPS
        average_slope = shifted.log() + mean_probability / shifted
        with full_precision(vectors.device):
            for rows in _blocks(vectors, codebook):
                log_probability = _log_probabilities(vectors[rows], codebook)
                probability = log_probability.exp()
                # Slope by p: r = average_slope - log p; by the affinities: p (r - <p, r>).
                mean_slope = torch.mv(probability, average_slope) + entropies[rows]
                slope = log_probability.neg_().add_(average_slope).sub_(mean_slope[:, None])
                grad_affinities = slope.mul_(probability)
                grad_vectors[rows] = grad_affinities @ codebook
                grad_codebook.addmm_(grad_affinities.T, vectors[rows])
        # By all G * N vectors of a group, 1 / (G * N) of the loss is this rank's; the ranks' mean
        # brings the 1 / G. So the average's own gradient needs no exchange.
        factor = grad_loss * (COSINE_SCALE / len(vectors))
        return grad_vectors.mul_(factor), grad_codebook.mul_(factor), None


def _log_probabilities(vectors: Tensor, codebook: Tensor) -> Tensor:
    # A saved log-normalizer would spare the backward pass a maximum and a sum. But at 200 it rounds
    # by 1e-5, p no longer sums to 1, and gradients are wrong by 2e-4 where one code dominates.
    affinities = (vectors @ codebook.T).mul_(COSINE_SCALE)
    return torch.log_softmax(affinities, dim=1).clamp_(min=LOWEST_LOG_PROBABILITY)


def _blocks(vectors: Tensor, codebook: Tensor) -> Iterator[slice]:
    size = rows_per_block(len(codebook), vectors.device)
    return (slice(start, start + size) for start in range(0, len(vectors), size))
