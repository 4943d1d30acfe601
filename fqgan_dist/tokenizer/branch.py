"""The branch of one codebook: adapter, output convolutions, quantizer.

Letters: B images, C channels, D code dim, h w latent grid.
Source: reference/fqgan.md, section 1.3.
"""

from __future__ import annotations

from torch import Tensor, nn

from fqgan_dist.tokenizer.adapter import FeatureAdapter
from fqgan_dist.tokenizer.config import TokenizerConfig
from fqgan_dist.tokenizer.layers import GroupNormSilu
from fqgan_dist.tokenizer.quantizer import VectorQuantizer


class CodebookBranch(nn.Module):
    """What one codebook has for itself between the shared encoder and the shared decoder.

    Without an adapter this is the single branch of the VQGAN baseline.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.deepest_channels
        self.adapter: nn.Module = nn.Identity()
        if config.adapter is not None:
            self.adapter = FeatureAdapter(
                config.adapter, num_positions=config.num_positions, width=width
            )
        self.norm_out = GroupNormSilu(config.num_groups, width)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map encoder features (B, C, h, w) to the map before quantization, (B, D, h, w)."""
        hidden = self.conv_out(self.norm_out(self.adapter(features)))
        return self.quant_conv(hidden)
