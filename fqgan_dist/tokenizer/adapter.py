"""The feature adapter: from the shared encoder features to those of one codebook.

Letters: B images, C channels, h w latent grid.
Source: reference/fqgan.md, section 1.3.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.tokenizer.config import AdapterConfig
from fqgan_dist.tokenizer.transformer import Transformer


class FeatureAdapter(nn.Module):
    """A transformer over the latent grid, row-major; there is no residual around it."""

    def __init__(self, config: AdapterConfig, *, num_positions: int, width: int) -> None:
        super().__init__()
        self.transformer = Transformer(
            num_positions, width, num_layers=config.num_layers, num_heads=config.num_heads
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, C, h, w) to the same shape."""
        tokens = self.transformer(rearrange(features, "B C h w -> B (h w) C"))
        return rearrange(tokens, "B (h w) C -> B C h w", h=features.shape[2])
