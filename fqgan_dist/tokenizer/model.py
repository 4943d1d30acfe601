"""The factorized tokenizer: an image <-> K grids of codes, for any K.

Letters: B images, C channels, H W pixels, K codebooks, D code dim, h w latent grid.
Source: FQGAN, arXiv 2411.16681; reference/fqgan.md, section 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.tokenizer.branch import CodebookBranch
from fqgan_dist.tokenizer.config import CodebookConfig, TokenizerConfig
from fqgan_dist.tokenizer.decoder import Decoder
from fqgan_dist.tokenizer.encoder import Encoder
from fqgan_dist.tokenizer.feature_head import FeatureHead
from fqgan_dist.tokenizer.quantizer import QuantizerOutput, VectorQuantizer


@dataclass(frozen=True, kw_only=True)
class TokenizerOutput:
    """What one forward pass of the tokenizer gives; losses are unweighted."""

    reconstruction: Tensor
    """(B, 3, H, W), about [-1, 1] but not clamped."""
    codes: Tensor
    """(B, K, h, w) int64."""
    quantized: list[Tensor]
    """Per codebook the straight-through map of unit vectors, (B, D, h, w) float32."""
    class_tokens: dict[str, Tensor]
    """Per teacher the predicted feature, (B, feature_dim); empty without feature heads."""
    codebook_loss: Tensor | None
    """(K,) float32; None in eval mode."""
    commitment_loss: Tensor | None
    """(K,) float32; None in eval mode."""
    entropy_loss: Tensor | None
    """(K,) float32; None in eval mode or when not asked for."""


class FactorizedTokenizer(nn.Module):
    """Shared encoder, one branch per codebook, shared decoder of the concatenated vectors."""

    def __init__(self, config: TokenizerConfig, *, with_feature_heads: bool = True) -> None:
        """Build the model with random weights from torch's default generator.

        Args:
            config: architecture.
            with_feature_heads: whether to build the heads that only training needs.

        Raises:
            ValueError: a head is to be built for features of unknown size.
        """
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.branches = nn.ModuleDict(
            {codebook.name: CodebookBranch(config) for codebook in config.codebooks}
        )
        self.post_quant_conv = nn.Conv2d(
            config.num_codebooks * config.code_dim, config.latent_channels, 1
        )
        self.decoder = Decoder(config)
        self.feature_heads = nn.ModuleDict(
            {
                codebook.name: FeatureHead(
                    config.feature_head,
                    num_positions=config.num_positions,
                    code_dim=config.code_dim,
                    feature_dim=_require_feature_dim(codebook),
                )
                for codebook in config.codebooks
                if with_feature_heads and codebook.teacher is not None
            }
        )

    def encode(self, images: Tensor) -> list[Tensor]:
        """Encode images to each codebook's map before quantization.

        Args:
            images: (B, 3, H, W) float in [-1, 1].

        Returns:
            K maps (B, D, h, w).

        Raises:
            ValueError: the images are not of the configured size.
        """
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, 3, {size}, {size}); "
                "resize them or change tokenizer.image_size"
            )
        features = self.encoder(images)
        return [branch(features) for branch in self.branches.values()]

    def encode_codes(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to codes (B, K, h, w) int64, without losses."""
        maps = self.encode(images)
        return torch.stack(
            [
                quantizer.encode_codes(latents)
                for quantizer, latents in zip(self._quantizers(), maps, strict=True)
            ],
            dim=1,
        )

    def decode_codes(self, codes: Tensor, *, keep: Sequence[int] | None = None) -> Tensor:
        """Decode codes to images.

        Args:
            codes: (B, K, h, w) int64.
            keep: indices of the codebooks whose vectors are used, the others' are zeros: what each
                codebook says of an image (the paper's figure 3); None keeps all.

        Returns:
            Images (B, 3, H, W), about [-1, 1] but not clamped.

        Raises:
            ValueError: codes have another shape, or `keep` names no codebook.
        """
        self._check_codes(codes)
        num_codebooks = self.config.num_codebooks
        kept = set(range(num_codebooks) if keep is None else keep)
        if not kept or not kept <= set(range(num_codebooks)):
            raise ValueError(
                f"keep: {sorted(kept)}: expected indices of codebooks in [0, {num_codebooks})"
            )
        vectors = [
            quantizer.lookup(codes[:, index]) for index, quantizer in enumerate(self._quantizers())
        ]
        return self._decode(
            [
                each if index in kept else torch.zeros_like(each)
                for index, each in enumerate(vectors)
            ]
        )

    def forward(
        self,
        images: Tensor,
        *,
        codes: Tensor | None = None,
        compute_entropy: bool = True,
        loss_group: LossGroup = ALONE,
    ) -> TokenizerOutput:
        """Encode, quantize, decode; in train mode compute the quantizers' losses.

        Args:
            images: (B, 3, H, W) float in [-1, 1].
            codes: assignments to use instead of the nearest codes, (B, K, h, w) int64.
            compute_entropy: whether the entropy loss is wanted in train mode.
            loss_group: the ranks whose images share the entropy loss's average.
        """
        if codes is not None:
            self._check_codes(codes)
        outputs: list[QuantizerOutput] = [
            quantizer(
                latents,
                codes=None if codes is None else codes[:, index],
                compute_entropy=compute_entropy,
                loss_group=loss_group,
            )
            for index, (quantizer, latents) in enumerate(
                zip(self._quantizers(), self.encode(images), strict=True)
            )
        ]
        quantized = [output.quantized for output in outputs]
        return TokenizerOutput(
            reconstruction=self._decode(quantized),
            codes=torch.stack([output.codes for output in outputs], dim=1),
            quantized=quantized,
            class_tokens=self._predict_features(quantized),
            codebook_loss=_stack([output.codebook_loss for output in outputs]),
            commitment_loss=_stack([output.commitment_loss for output in outputs]),
            entropy_loss=_stack([output.entropy_loss for output in outputs]),
        )

    def _quantizers(self) -> list[VectorQuantizer]:
        # ModuleDict keeps the order of the config: codebook k is column k of all codes ever stored.
        return [cast(CodebookBranch, branch).quantizer for branch in self.branches.values()]

    def _decode(self, quantized: Sequence[Tensor]) -> Tensor:
        return self.decoder(self.post_quant_conv(torch.cat(list(quantized), dim=1)))

    def _predict_features(self, quantized: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            codebook.teacher: self.feature_heads[codebook.name](each)
            for codebook, each in zip(self.config.codebooks, quantized, strict=True)
            if codebook.teacher is not None and codebook.name in self.feature_heads
        }

    def _check_codes(self, codes: Tensor) -> None:
        expected = (self.config.num_codebooks, self.config.grid_size, self.config.grid_size)
        if codes.ndim != 4 or codes.shape[1:] != expected or codes.dtype != torch.int64:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}, {codes.dtype}: expected (B, {expected[0]}, "
                f"{expected[1]}, {expected[2]}) int64"
            )


def _stack(losses: Sequence[Tensor | None]) -> Tensor | None:
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present) if present else None


def _require_feature_dim(codebook: CodebookConfig) -> int:
    if codebook.feature_dim is None:
        raise ValueError(
            f"codebook {codebook.name!r}: feature_dim is None, with teacher {codebook.teacher!r}; "
            "give the size of its features, which a run's config fills in"
        )
    return codebook.feature_dim
