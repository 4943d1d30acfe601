"""The pre-norm transformer block of the adapters and feature heads.

Letters: B images, T positions, E width, N heads.
Source: reference/fqgan.md, section 1.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.tokenizer.config import LAYER_NORM_EPS


class SelfAttention(nn.Module):
    """Multi-head self-attention, no mask, no dropout; initialised like nn.MultiheadAttention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, E) to the same shape."""
        query, key, value = rearrange(
            self.in_proj(tokens),
            "B T (three N head) -> three B N T head",
            three=3,
            N=self.num_heads,
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(rearrange(attended, "B N T head -> B T (N head)"))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is 4 times as wide, exact GELU."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, E) to the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """Learned position embedding, LayerNorm, blocks, LayerNorm."""

    def __init__(self, num_positions: int, width: int, *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.positions = embedding_parameter(num_positions, width)
        self.norm_in = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads) for _ in range(num_layers))
        )
        self.norm_out = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T, E) to the same shape; T is the configured number of positions."""
        return self.norm_out(self.blocks(self.norm_in(tokens + self.positions)))


def embedding_parameter(num_rows: int, width: int) -> nn.Parameter:
    """Make a learned (rows, E) embedding, drawn from N(0, 1/E)."""
    return nn.Parameter(torch.randn(num_rows, width) * width**-0.5)
