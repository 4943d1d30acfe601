"""How much of each codebook the recent training tokens used (the paper's Table 3, "usage").

The released code keeps a window of the last 65,536 tokens per rank, zero-initialised so that code 0
always counts (fqgan.md 1.4). Ours is the window of the whole job, in micro-batch order, so that the
number does not depend on the number of ranks, and unwritten entries count for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CodeUsageWindow(nn.Module):
    """First-in first-out window of the last codes of each codebook."""

    codes: Tensor

    def __init__(self, num_codebooks: int, codebook_size: int, num_tokens: int = 65_536) -> None:
        """Start with an empty window of `num_tokens` entries per codebook."""
        super().__init__()
        self.codebook_size = codebook_size
        # Unwritten entries hold codebook_size, one past the last code.
        self.register_buffer(
            "codes", torch.full((num_codebooks, num_tokens), codebook_size, dtype=torch.int32)
        )

    def update(self, codes: Tensor, *, refused: Tensor | None = None) -> None:
        """Push codes (K, n), oldest first; those of a step that was refused, bool (), do not count.

        The device decides about the step: nobody waits for it.
        """
        window = self.codes.shape[1]
        pushed = torch.cat([self.codes, codes.to(torch.int32)], dim=1)[:, -window:]
        if refused is not None:
            pushed = torch.where(refused, self.codes, pushed)
        self.codes.copy_(pushed)

    def compute_usage(self) -> Tensor:
        """Return the fraction of each codebook that occurs in the window, (K,) float32."""
        num_codebooks = self.codes.shape[0]
        seen = torch.zeros(num_codebooks, self.codebook_size + 1, device=self.codes.device)
        # Not bincount or unique: on a GPU both wait for the device to know the result's size.
        seen.scatter_(1, self.codes.long(), 1.0)
        return seen[:, :-1].mean(dim=1)
