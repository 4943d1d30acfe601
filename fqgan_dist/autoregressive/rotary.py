"""Two-dimensional rotary position embedding of the code grid.

Source: FQGAN, arXiv 2411.16681, released FAR; inherited from LlamaGen, arXiv 2406.06525.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Letters: B batch, T positions, K codebooks, N heads, S sequence length, d channels of one head.


class Rotation(NamedTuple):
    """Cosines and sines of consecutive tokens, each (S, d/2) float32."""

    cos: Tensor
    sin: Tensor


class RotaryTable(nn.Module):
    """Rotations of the class token and the T grid cells, row-major: 1 + T rows.

    Row 0, the class token's, has cosine *and* sine zero, so it turns any query and key into zeros:
    every position sees the class token with attention logit 0. Identity would be the natural
    choice, but the published models were trained with this table, and with identity they are other
    functions. Of a head's d/2 channel pairs, the first half turns with the cell's row, the second
    half with its column, by index / base^(2j / (d/2)).

    The table is not part of the state dict.
    """

    def __init__(self, grid_size: int, head_dim: int, base: float) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.head_dim = head_dim
        self.base = base
        self.cos: Tensor
        self.sin: Tensor
        self._fill(torch.get_default_device())

    def forward(self, start: int, stop: int) -> Rotation:
        """Slice rows start to stop: row 0 is the class token, row 1 + i is grid cell i."""
        return Rotation(self.cos[start:stop], self.sin[start:stop])

    def _fill(self, device: torch.device) -> None:
        quarter = self.head_dim // 4
        cells = torch.arange(self.grid_size, device=device, dtype=torch.float32)
        exponents = torch.arange(quarter, device=device, dtype=torch.float32) / (2 * quarter)
        angles = torch.outer(cells, self.base ** (-2.0 * exponents))
        by_row = angles[:, None].expand(-1, self.grid_size, -1)
        by_column = angles[None].expand(self.grid_size, -1, -1)
        grid = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        class_row = torch.zeros(1, 2 * quarter, device=device)
        for name, values in (("cos", grid.cos()), ("sin", grid.sin())):
            # Not in checkpoints: the config says it all, and released weights have no such table.
            self.register_buffer(name, torch.cat([class_row, values]), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        # `model.bfloat16()` would round the angles, and `model.to_empty()` leaves them undefined:
        # follow the device only, and compute the values again.
        super()._apply(fn, recurse)
        self._fill(self.cos.device)
        return self


def rotate(channels: Tensor, rotation: Rotation) -> Tensor:
    """Rotate adjacent channel pairs (2j, 2j+1) of queries or keys.

    Args:
        channels: (B, S, N, d) float.
        rotation: of the S tokens.

    Returns:
        (B, S, N, d), at least float32: the caller casts where it can afford to.
    """
    pairs = channels.to(torch.promote_types(channels.dtype, torch.float32)).unflatten(-1, (-1, 2))
    even, odd = pairs.unbind(-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
