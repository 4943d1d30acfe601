"""Losses of the tokenizer that are no quantizer's own; all unweighted, all in fp32.

Letters: B images, D code dim, h w latent grid, E width of a teacher's features.
Source: reference/fqgan.md, sections 1.6, 1.7 and 1.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.tokenizer.precision import full_precision


def disentanglement_loss(quantized: Sequence[Tensor]) -> Tensor:
    """Penalize alignment of the codebooks' selected vectors.

    Mean over all pairs of codebooks of the mean squared cosine over positions: 0 when orthogonal, 1
    when parallel. The gradient of straight-through maps reaches the encoder only.

    Args:
        quantized: one map per codebook, each (B, D, h, w) float.

    Returns:
        Scalar, float32; 0 for a single codebook.

    Raises:
        ValueError: there is no map, or shapes differ.

    Source: FQGAN, arXiv 2411.16681, equation (7), as the released code reads it: per position, and
        for three codebooks the mean of three pairs.
    """
    shapes = {tuple(each.shape) for each in quantized}
    if len(shapes) != 1:
        raise ValueError(
            f"quantized maps of shapes {sorted(shapes)}: expected one or more, all alike"
        )
    units = [F.normalize(each.float(), dim=1) for each in quantized]
    pairs = list(combinations(units, 2))
    if not pairs:
        return units[0].new_zeros(())
    return torch.stack([(a * b).sum(dim=1).square().mean() for a, b in pairs]).mean()


def info_nce_loss(predicted: Tensor, target: Tensor, loss_group: LossGroup = ALONE) -> Tensor:
    """Contrast each predicted feature with the teacher's features of all images of the batch.

    Temperature 1, one direction, negatives from this batch only: log B at chance, and never below
    log(1 + (B - 1) exp(-B / (B - 1))), B being the images of all ranks that share the batch.

    Args:
        predicted: predicted features, (B, E) float.
        target: teacher's features, (B, E) float; no gradient reaches them.
        loss_group: the ranks that share the batch; the result is the mean over this rank's images.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: shapes differ or are not (B, E).

    Source: FQGAN's representation learning (semantic loss).
    """
    if predicted.ndim != 2 or predicted.shape != target.shape:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)}: expected "
            "the same (B, E)"
        )
    # Only the teacher's features are exchanged. They need no gradient, so the backward pass needs
    # no exchange at all.
    targets = loss_group.gather(target.float()).flatten(0, 1)
    own = torch.arange(len(targets), device=targets.device)[loss_group.rows(len(predicted))]
    with full_precision(predicted.device):
        similarity = F.normalize(predicted.float(), dim=1) @ F.normalize(targets, dim=1).T
        return F.cross_entropy(similarity, own)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Push real logits above 1 and fake ones below -1: half the sum of the two hinge means."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Raise the discriminator's logits of reconstructions: minus their mean."""
    return -fake.float().mean()
