"""The convolutional decoder.

Letters: B images, C channels, H W pixels, h w latent grid.
Source: reference/fqgan.md, section 1.5.
"""

from __future__ import annotations

from torch import Tensor, nn

from fqgan_dist.tokenizer.config import TokenizerConfig
from fqgan_dist.tokenizer.layers import GroupNormSilu, Level, Upsample, build_middle


class Decoder(nn.Module):
    """Latent map -> image; levels are stored deepest first, attention in the deepest only."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid = build_middle(channels[0], config.num_groups)
        self.levels = nn.Sequential(
            *(
                Level(
                    channels[max(level - 1, 0)],
                    channels[level],
                    num_res_blocks=config.num_res_blocks + 1,
                    num_groups=config.num_groups,
                    has_attention=level == 0,
                    resample=None if level == last else Upsample(channels[level]),
                )
                for level in range(len(channels))
            )
        )
        self.norm_out = GroupNormSilu(config.num_groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents (B, C, h, w) to images (B, 3, H, W), about [-1, 1] but not clamped."""
        features = self.levels(self.mid(self.conv_in(latents)))
        return self.conv_out(self.norm_out(features))
