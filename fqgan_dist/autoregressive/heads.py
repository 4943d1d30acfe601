"""Factor heads: from a position's hidden state to one feature vector per codebook.

`AutoregressiveHead` is FAR's; `LinearHead` and `MlpHead` are the independent alternatives of the
paper's Table 4, of which no code was released: "k linear" is read as K classifiers on the
normalised hidden state, "k MLP" as K two-layer perceptrons on it.

Source: FQGAN, arXiv 2411.16681, factorized autoregressive head and Table 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from fqgan_dist.autoregressive.blocks import (
    KeyValueCache,
    RmsNorm,
    TransformerBlock,
    build_caches,
    short_causal_attention,
)
from fqgan_dist.autoregressive.config import (
    AutoregressiveConfig,
    AutoregressiveHeadConfig,
    LinearHeadConfig,
    MlpHeadConfig,
)
from fqgan_dist.autoregressive.rotary import RotaryTable

# Letters: B batch, T positions, K codebooks, E width, F channels of a feature vector.


class FactorHead(nn.Module, ABC):
    """What the transformer and the decoder ask of a factor head.

    Codebook i's logits are `classifier_i(features_i)`, without a bias: linear in the features, so
    that classifier-free guidance can be applied to the features.
    """

    feature_width: int
    """F, channels that a classifier takes."""
    norm: RmsNorm
    """The model's final normalisation."""

    @abstractmethod
    def forward(
        self, hidden: Tensor, code_embeddings: Sequence[Tensor], rotary_table: RotaryTable
    ) -> Tensor:
        """Compute all features under teacher forcing.

        Args:
            hidden: backbone output, (B, T, E).
            code_embeddings: embeddings of the true codes of these positions in all codebooks but
                the last, K - 1 of (B, T, E).
            rotary_table: the backbone's.

        Returns:
            (B, K, T, F).
        """

    @abstractmethod
    def decode(
        self,
        inputs: Tensor,
        codebook: int,
        rotary_table: RotaryTable,
        caches: Sequence[KeyValueCache],
    ) -> Tensor:
        """Compute one codebook's features at one position.

        Args:
            inputs: (B, E); what it is says `is_autoregressive`.
            codebook: index of the codebook to predict; 0 begins a position.
            rotary_table: the backbone's.
            caches: of `build_caches`.

        Returns:
            (B, F).
        """

    @property
    @abstractmethod
    def is_autoregressive(self) -> bool:
        """Whether `decode` takes the previous code's embedding after the first codebook.

        If not, it takes the hidden state for every codebook.
        """

    @abstractmethod
    def build_caches(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[KeyValueCache]:
        """Allocate what `decode` writes; every position overwrites the one before."""


class AutoregressiveHead(FactorHead):
    """A causal transformer over [hidden state, code 1, ..., code K-1] at every position.

    It has no projections or embeddings of its own: it takes the raw residual stream and the
    embeddings of the backbone's input. Its K tokens use the first K rows of the backbone's rotary
    table, the zero row for the hidden state included.
    """

    def __init__(self, config: AutoregressiveConfig, head_config: AutoregressiveHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_width = config.width
        self.blocks = nn.ModuleList(
            TransformerBlock(config, short_causal_attention) for _ in range(head_config.num_layers)
        )
        self.norm = RmsNorm(config.width, config.norm_eps)

    @override
    def forward(
        self, hidden: Tensor, code_embeddings: Sequence[Tensor], rotary_table: RotaryTable
    ) -> Tensor:
        tokens = torch.stack([hidden, *code_embeddings], dim=2)
        x = rearrange(tokens, "B T K E -> (B T) K E")
        rotation = rotary_table(0, self.config.num_codebooks)
        for block in self.blocks:
            x = block(x, rotation)
        return rearrange(self.norm(x), "(B T) K E -> B K T E", B=hidden.shape[0])

    @override
    def decode(
        self,
        inputs: Tensor,
        codebook: int,
        rotary_table: RotaryTable,
        caches: Sequence[KeyValueCache],
    ) -> Tensor:
        x = inputs
        rotation = rotary_table(codebook, codebook + 1)
        for block, cache in zip(self.blocks, caches, strict=True):
            assert isinstance(block, TransformerBlock), "the head holds transformer blocks only"
            x = block.decode(x, rotation, cache, codebook)
        return self.norm(x)

    @property
    @override
    def is_autoregressive(self) -> bool:
        return True

    @override
    def build_caches(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[KeyValueCache]:
        return build_caches(
            self.config,
            num_layers=len(self.blocks),
            batch_size=batch_size,
            num_tokens=self.config.num_codebooks,
            dtype=dtype,
            device=device,
        )


class _IndependentHead(FactorHead):
    """A head whose codebooks see the hidden state only, never each other's codes."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.num_codebooks = config.num_codebooks
        self.norm = RmsNorm(config.width, config.norm_eps)

    @abstractmethod
    def _features(self, normalised: Tensor, codebook: int) -> Tensor:
        """Compute one codebook's features, (..., E) to (..., F)."""

    @override
    def forward(
        self, hidden: Tensor, code_embeddings: Sequence[Tensor], rotary_table: RotaryTable
    ) -> Tensor:
        normalised = self.norm(hidden)
        features = [self._features(normalised, i) for i in range(self.num_codebooks)]
        return torch.stack(features, dim=1)

    @override
    def decode(
        self,
        inputs: Tensor,
        codebook: int,
        rotary_table: RotaryTable,
        caches: Sequence[KeyValueCache],
    ) -> Tensor:
        return self._features(self.norm(inputs), codebook)

    @property
    @override
    def is_autoregressive(self) -> bool:
        return False

    @override
    def build_caches(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[KeyValueCache]:
        return []


class LinearHead(_IndependentHead):
    """The normalised hidden state itself, for K linear classifiers."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__(config)
        self.feature_width = config.width

    @override
    def _features(self, normalised: Tensor, codebook: int) -> Tensor:
        return normalised


class MlpHead(_IndependentHead):
    """The hidden layers of K two-layer perceptrons; the classifiers are their second layers."""

    def __init__(self, config: AutoregressiveConfig, head_config: MlpHeadConfig) -> None:
        super().__init__(config)
        self.feature_width = head_config.hidden_multiple * config.width
        self.hidden_layers = nn.ModuleList(
            nn.Linear(config.width, self.feature_width, bias=False)
            for _ in range(config.num_codebooks)
        )

    @override
    def _features(self, normalised: Tensor, codebook: int) -> Tensor:
        return functional.silu(self.hidden_layers[codebook](normalised))


def build_factor_head(config: AutoregressiveConfig) -> FactorHead:
    """Build the head that `config.factor_head` names."""
    match config.factor_head:
        case AutoregressiveHeadConfig() as head_config:
            return AutoregressiveHead(config, head_config)
        case LinearHeadConfig():
            return LinearHead(config)
        case MlpHeadConfig() as head_config:
            return MlpHead(config, head_config)
