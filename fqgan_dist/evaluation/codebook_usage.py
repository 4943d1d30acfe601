"""How often each code is used: usage, perplexity and unigram entropy per codebook."""

from __future__ import annotations

import torch
from torch import Tensor


class CodeHistogram:
    """Counts of the codes of K codebooks with V entries each; exact, in any order."""

    counts: Tensor
    """(K, V) int64, on the CPU."""

    def __init__(self, num_codebooks: int, codebook_size: int) -> None:
        self.counts = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Count codes in place.

        Args:
            codes: (B, K, h, w) int64 in [0, V); any device.

        Raises:
            ValueError: the number of codebooks differs, or a code is out of range.
        """
        num_codebooks, codebook_size = self.counts.shape
        if codes.ndim != 4 or codes.shape[1] != num_codebooks:
            raise ValueError(
                f"codes: shape {tuple(codes.shape)} - expected (B, {num_codebooks}, h, w)"
            )
        by_codebook = codes.detach().cpu().long().transpose(0, 1).reshape(num_codebooks, -1)
        if by_codebook.numel() == 0:
            return
        low, high = by_codebook.min().item(), by_codebook.max().item()
        if low < 0 or high >= codebook_size:
            raise ValueError(f"codes: range [{low}, {high}] - expected [0, {codebook_size})")
        for row, values in zip(self.counts, by_codebook, strict=True):
            row += torch.bincount(values, minlength=codebook_size)

    @property
    def usage(self) -> Tensor:
        """Fraction of each codebook's entries that occur, (K,) float64."""
        return (self.counts > 0).double().mean(dim=1)

    @property
    def unigram_entropy(self) -> Tensor:
        """Entropy of each codebook's code frequencies, (K,) float64, nats.

        The loss of a generator that knows the frequencies and nothing else.

        Raises:
            ValueError: nothing was counted.
        """
        totals = self.counts.sum(dim=1, keepdim=True)
        if (totals == 0).any():
            raise ValueError("counts: no code was counted - expected at least one per codebook")
        # special.entr is -p log p with 0 at p = 0.
        return torch.special.entr(self.counts.double() / totals).sum(dim=1)

    @property
    def perplexity(self) -> Tensor:
        """Number of equally used codes of the same entropy, (K,) float64 in [1, V]."""
        return self.unigram_entropy.exp()
