"""Settings of the factorized tokenizer; the defaults are FQGAN's f16 models.

Source: FQGAN, arXiv 2411.16681, sizes from the released code; LlamaGen's VQ-16 (the baseline).
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from fqgan_dist.config import Config

GROUP_NORM_EPS = 1e-6
"""Epsilon of every GroupNorm; torch's default of 1e-5 is not the released models'."""
LAYER_NORM_EPS = 1e-5
"""Epsilon of every LayerNorm in adapters and feature heads."""


class AdapterConfig(Config):
    """The transformer that turns shared encoder features into those of one codebook."""

    num_layers: PositiveInt = 6
    """Transformer blocks."""
    num_heads: PositiveInt = 8
    """Attention heads; divides the channels of the deepest level, the adapter's width."""


class FeatureHeadConfig(Config):
    """The transformer that predicts a teacher's feature from one codebook's quantized map."""

    num_layers: PositiveInt = 3
    """Transformer blocks."""
    num_heads: PositiveInt = 8
    """Attention heads; divides the feature size of every teacher."""


class CodebookConfig(Config):
    """One codebook: its name and, for a semantic one, the teacher whose feature it predicts."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name in metrics, reports and parameter names."""
    teacher: str | None = None
    """Name of the teacher; None for a codebook that learns from reconstruction alone."""
    feature_dim: PositiveInt | None = None
    """Size of the teacher's feature vector; None without a teacher."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if hasattr(nn.ModuleDict, self.name) or self.name == "training":
            raise ValueError(
                f"name: {self.name!r} is a name that torch keeps for itself; rename it"
            )
        if (self.teacher is None) != (self.feature_dim is None):
            raise ValueError(
                f"teacher is {self.teacher!r} and feature_dim is {self.feature_dim!r}; "
                "a semantic codebook needs both, another neither"
            )
        return self


class TokenizerConfig(Config):
    """Architecture of the tokenizer: image <-> K grids of codes."""

    image_size: PositiveInt = 256
    """Height and width of images, pixels."""
    base_channels: PositiveInt = 128
    """Channels of the finest level."""
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """Channels of each level, finest first, in base_channels; sizes halve between levels."""
    num_res_blocks: PositiveInt = 2
    """Residual blocks per encoder level; the decoder has one more."""
    latent_channels: PositiveInt = 256
    """Channels between the convolutional networks and the 1 x 1 quantization convolutions."""
    num_groups: PositiveInt = 32
    """Groups of every GroupNorm; divides every level's channels."""
    adapter: AdapterConfig | None = AdapterConfig()
    """Feature adapter of each codebook; None is the VQGAN baseline (one codebook, no adapter)."""
    codebooks: Annotated[tuple[CodebookConfig, ...], Field(min_length=1)]
    """Codebooks in the order of codes and of the decoder's input: visual first."""
    codebook_size: Annotated[int, Field(ge=2)] = 16384
    """Codes per codebook, V."""
    code_dim: Annotated[int, Field(ge=2)] = 8
    """Dimensions of a code, D."""
    feature_head: FeatureHeadConfig = FeatureHeadConfig()
    """Feature-prediction head of every codebook with a teacher."""

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks, K."""
        return len(self.codebooks)

    @property
    def downsample(self) -> int:
        """Pixels per latent position along each axis, f."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Latent positions along each axis, h = w."""
        return self.image_size // self.downsample

    @property
    def num_positions(self) -> int:
        """Latent positions of an image, T = h * w."""
        return self.grid_size**2

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def deepest_channels(self) -> int:
        """Channels of the coarsest level: the width of the adapters."""
        return self.level_channels[-1]

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [*self._size_problems(), *self._name_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _size_problems(self) -> list[str]:
        problems: list[str] = []
        if self.image_size % self.downsample:
            problems.append(
                f"image_size: {self.image_size} is not a multiple of {self.downsample}, which "
                f"{len(self.channel_multipliers)} levels downsample by; change image_size or "
                "channel_multipliers"
            )
        problems += [
            f"num_groups: {self.num_groups} does not divide the {channels} channels of a level; "
            "change num_groups or base_channels"
            for channels in sorted(set(self.level_channels))
            if channels % self.num_groups
        ]
        if self.adapter is None and self.num_codebooks > 1:
            problems.append(
                f"adapter: none, with {self.num_codebooks} codebooks; they would all see the same "
                "features: give an adapter or a single codebook"
            )
        if self.adapter is not None and self.deepest_channels % self.adapter.num_heads:
            problems.append(
                f"adapter.num_heads: {self.adapter.num_heads} does not divide the "
                f"{self.deepest_channels} channels of the deepest level"
            )
        problems += [
            f"feature_head.num_heads: {self.feature_head.num_heads} does not divide feature_dim "
            f"{codebook.feature_dim} of codebook {codebook.name!r}"
            for codebook in self.codebooks
            if codebook.feature_dim is not None
            and codebook.feature_dim % self.feature_head.num_heads
        ]
        return problems

    def _name_problems(self) -> list[str]:
        names = Counter(codebook.name for codebook in self.codebooks)
        teachers = Counter(codebook.teacher for codebook in self.codebooks if codebook.teacher)
        return [
            f"codebooks: {kind} {name!r} appears {count} times; each may appear once"
            for kind, counts in (("name", names), ("teacher", teachers))
            for name, count in counts.items()
            if count > 1
        ]
