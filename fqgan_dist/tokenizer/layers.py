"""Convolutional building blocks of the encoder and decoder.

Letters: B images, C channels, H W pixels or positions, T = H * W.
Source: VQGAN, arXiv 2012.09841, as in LlamaGen and FQGAN; reference/fqgan.md, sections 1.2, 1.5.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.tokenizer.config import GROUP_NORM_EPS


class GroupNormSilu(nn.GroupNorm):
    """GroupNorm followed by x * sigmoid(x)."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__(num_groups, channels, eps=GROUP_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return F.silu(super().forward(input))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each after GroupNorm and SiLU, around a shortcut.

    The shortcut is the identity, or a 1 x 1 convolution where the channels change.
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSilu(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSilu(num_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        hidden = self.conv1(self.norm1(features))
        hidden = self.conv2(self.norm2(hidden))
        return self.shortcut(features) + hidden


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual; no activation."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=GROUP_NORM_EPS)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape; attention scores are scaled by C^-0.5."""
        height = features.shape[2]
        normed = self.norm(features)
        query, key, value = (
            rearrange(projection(normed), "B C H W -> B 1 (H W) C")
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return features + self.out(rearrange(attended, "B 1 (H W) C -> B C H W", H=height))


class Downsample(nn.Module):
    """Halve height and width by a 3 x 3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H/2, W/2)."""
        # The released models pad on the right and the bottom only.
        return self.conv(F.pad(features, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbours and a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(features, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each at the deepest, a resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_res_blocks: int,
        num_groups: int,
        has_attention: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        self.residual_blocks = nn.ModuleList(
            ResidualBlock(in_channels if index == 0 else out_channels, out_channels, num_groups)
            for index in range(num_res_blocks)
        )
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(out_channels, num_groups) if has_attention else nn.Identity()
            for _ in range(num_res_blocks)
        )
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W')."""
        for residual, attention in zip(self.residual_blocks, self.attention_blocks, strict=True):
            features = attention(residual(features))
        return self.resample(features)


def build_middle(channels: int, num_groups: int) -> nn.Sequential:
    """Build the residual, attention, residual blocks between the levels and the latent."""
    return nn.Sequential(
        ResidualBlock(channels, channels, num_groups),
        AttentionBlock(channels, num_groups),
        ResidualBlock(channels, channels, num_groups),
    )
