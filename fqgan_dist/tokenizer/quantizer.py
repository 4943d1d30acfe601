"""Vector quantization against a codebook of unit vectors, always in fp32.

Letters: B images, N vectors, V codebook size, D code dim, h w latent grid.
Source: reference/fqgan.md, section 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.tokenizer.entropy import entropy_loss
from fqgan_dist.tokenizer.precision import full_precision, rows_per_block


@dataclass(frozen=True, kw_only=True)
class QuantizerOutput:
    """One codebook's quantized map, its codes and, in training, its unweighted losses."""

    quantized: Tensor
    """Straight-through map of unit vectors, (B, D, h, w) float32."""
    codes: Tensor
    """(B, h, w) int64."""
    codebook_loss: Tensor | None = None
    """Mean squared distance, moving the codes to the encoder's vectors; None in eval mode."""
    commitment_loss: Tensor | None = None
    """The same distance, moving the encoder's vectors to the codes; None in eval mode."""
    entropy_loss: Tensor | None = None
    """See `entropy.entropy_loss`; None in eval mode or when not asked for."""


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Find the code of largest cosine for every vector.

    In fp32 whatever autocast and TF32 settings surround the call, in blocks of rows.

    Args:
        vectors: (N, D) float, of any length.
        codebook: (V, D) float, of any length.

    Returns:
        Codes, (N,) int64; the lowest one where several are equally near.

    Raises:
        ValueError: the two are not matrices with the same number of columns.
    """
    if vectors.ndim != 2 or codebook.ndim != 2 or vectors.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"vectors {tuple(vectors.shape)} and codebook {tuple(codebook.shape)}: expected (N, D) "
            "and (V, D) of one D"
        )
    with torch.no_grad(), full_precision(vectors.device):
        return _nearest_unit_codes(_normalize(vectors), _normalize(codebook))


class VectorQuantizer(nn.Module):
    """One codebook; vectors and codes are normalized at every use, the parameter itself is not."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        codebook = torch.empty(codebook_size, code_dim).uniform_(
            -1 / codebook_size, 1 / codebook_size
        )
        # Unit vectors at the start: of numbers as small as 1/V, the first steps of Adam, as long as
        # the learning rate, would turn every code at random.
        self.codebook = nn.Parameter(F.normalize(codebook, dim=1))

    def forward(
        self,
        latents: Tensor,
        *,
        codes: Tensor | None = None,
        compute_entropy: bool = True,
        loss_group: LossGroup = ALONE,
    ) -> QuantizerOutput:
        """Quantize a map; in train mode compute the losses too.

        Args:
            latents: map before quantization, (B, D, h, w) float.
            codes: assignments to use instead of the nearest codes, (B, h, w) int64.
            compute_entropy: whether the entropy loss is wanted; it costs most of the time.
            loss_group: the ranks that share the entropy loss's average.
        """
        with full_precision(latents.device):
            vectors = _normalize(rearrange(latents, "B D h w -> (B h w) D"))
            codebook = _normalize(self.codebook)
            chosen = _nearest_unit_codes(vectors, codebook) if codes is None else codes.flatten()
            selected = F.embedding(chosen, codebook)
            # Its gradient goes to the encoder alone, as if nothing had been quantized; the codebook
            # learns from its own loss below.
            straight_through = vectors + (selected - vectors).detach()
        batch, _, height, width = latents.shape
        shape = {"B": batch, "h": height, "w": width}
        losses: dict[str, Tensor] = {}
        if self.training:
            # One value, two losses: which side is detached decides what is moved, and their weights
            # differ.
            losses["codebook_loss"] = F.mse_loss(selected, vectors.detach())
            losses["commitment_loss"] = F.mse_loss(vectors, selected.detach())
            if compute_entropy:
                losses["entropy_loss"] = entropy_loss(vectors, codebook, loss_group)
        return QuantizerOutput(
            quantized=rearrange(straight_through, "(B h w) D -> B D h w", **shape),
            codes=rearrange(chosen, "(B h w) -> B h w", **shape),
            **losses,
        )

    def encode_codes(self, latents: Tensor) -> Tensor:
        """Map (B, D, h, w) to the nearest codes (B, h, w) int64, without losses."""
        codes = nearest_codes(rearrange(latents, "B D h w -> (B h w) D"), self.codebook)
        batch, _, height, width = latents.shape
        return rearrange(codes, "(B h w) -> B h w", B=batch, h=height, w=width)

    def lookup(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) int64 to their unit vectors (B, D, h, w) float32."""
        return rearrange(F.embedding(codes, _normalize(self.codebook)), "B h w D -> B D h w")


def _normalize(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=1)


@torch.no_grad()
def _nearest_unit_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    # Of unit vectors the nearest has the largest dot product; max takes the first of equals.
    block = rows_per_block(len(codebook), vectors.device)
    nearest = vectors.new_empty(len(vectors), dtype=torch.int64)
    for start in range(0, len(vectors), block):
        rows = slice(start, start + block)
        nearest[rows] = torch.max(vectors[rows] @ codebook.T, dim=1).indices
    return nearest
