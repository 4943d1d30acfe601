"""The convolutional encoder that all codebooks share.

Letters: B images, C channels, H W pixels, h w latent grid.
Source: reference/fqgan.md, section 1.2.
"""

from __future__ import annotations

from torch import Tensor, nn

from fqgan_dist.tokenizer.config import TokenizerConfig
from fqgan_dist.tokenizer.layers import Downsample, Level, build_middle


class Encoder(nn.Module):
    """Image -> features at the latent grid; attention at the deepest level only."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels
        deepest = len(channels) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.levels = nn.Sequential(
            *(
                Level(
                    channels[level - 1] if level else config.base_channels,
                    channels[level],
                    num_res_blocks=config.num_res_blocks,
                    num_groups=config.num_groups,
                    has_attention=level == deepest,
                    resample=None if level == deepest else Downsample(channels[level]),
                )
                for level in range(len(channels))
            )
        )
        self.mid = build_middle(config.deepest_channels, config.num_groups)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, C, h, w)."""
        return self.mid(self.levels(self.conv_in(images)))
