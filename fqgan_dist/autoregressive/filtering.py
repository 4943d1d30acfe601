"""From logits to a drawn code: top-k, top-p, inverse of the cumulative distribution."""

from __future__ import annotations

import torch
from torch import Tensor

# Letters: B batch, V codebook size.


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Set all logits below the k-th largest of their row to minus infinity, (B, V).

    Logits equal to the k-th largest all stay, as in the reference.
    """
    smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest codes of each row whose probabilities first exceed top_p, (B, V).

    A code is dropped if the codes before it, by falling probability, sum to more than top_p: so
    the one that crosses the threshold stays, and at least one does.
    """
    # Stable: of equal logits, common in bf16, the same ones stay on every device.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    dropped = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, mass_before > top_p)
    return logits.masked_fill(dropped, -torch.inf)


def invert_cumulative(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one code per row: the first whose cumulative probability exceeds the uniform number.

    Args:
        probabilities: (B, V) float, not necessarily normalised; zeros are never drawn.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64 in [0, V).
    """
    # In float64: at V = 16384 a float32 sum of rounded terms is off by more than a rare code's
    # share, and by another amount on every device.
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    # `right`: the first sum above the number, not the first that reaches it; so a code of
    # probability 0 is not drawn even where the number is 0.
    drawn = torch.searchsorted(cumulative, uniforms.double()[:, None] * total, right=True)
    # A uniform next to 1 may round to the total itself: the last code of any probability is meant.
    last = torch.searchsorted(cumulative, total.contiguous())
    return torch.minimum(drawn, last)[:, 0]
