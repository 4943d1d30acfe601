"""The head that predicts a teacher's feature from a semantic codebook's quantized map.

Letters: B images, D code dim, h w latent grid, T = h * w, E width (the teacher's feature size).
Source: reference/fqgan.md, section 1.6.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from fqgan_dist.tokenizer.config import FeatureHeadConfig
from fqgan_dist.tokenizer.transformer import Transformer, embedding_parameter


class FeatureHead(nn.Module):
    """A transformer over a class token and the quantized vectors; predicts by the class token."""

    def __init__(
        self, config: FeatureHeadConfig, *, num_positions: int, code_dim: int, feature_dim: int
    ) -> None:
        super().__init__()
        self.class_token = embedding_parameter(1, feature_dim)
        self.projection = nn.Sequential(
            nn.Linear(code_dim, feature_dim), nn.ReLU(), nn.Linear(feature_dim, feature_dim)
        )
        self.transformer = Transformer(
            num_positions + 1, feature_dim, num_layers=config.num_layers, num_heads=config.num_heads
        )

    def forward(self, quantized: Tensor) -> Tensor:
        """Map a straight-through quantized map (B, D, h, w) to predicted features (B, E)."""
        tokens = self.projection(rearrange(quantized, "B D h w -> B (h w) D"))
        class_tokens = repeat(self.class_token, "one E -> B one E", B=len(tokens))
        tokens = torch.cat([class_tokens, tokens], dim=1)
        return self.transformer(tokens)[:, 0]
