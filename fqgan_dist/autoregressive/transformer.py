"""FAR: from a class label and the codes so far to distributions over the next position's K codes.

Source: FQGAN, arXiv 2411.16681, factorized autoregressive model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from fqgan_dist.autoregressive.blocks import RmsNorm, TransformerBlock, causal_attention
from fqgan_dist.autoregressive.config import AutoregressiveConfig
from fqgan_dist.autoregressive.heads import build_factor_head
from fqgan_dist.autoregressive.rotary import RotaryTable

# Letters: B batch, K codebooks, h w latent grid, T = h*w, V codebook size, E width.


class FactorizedTransformer(nn.Module):
    """A causal backbone over [class, position 0, ..., position T-2] and a factor head on each.

    The backbone's output at token t predicts the K codes of position t. A position enters the
    backbone as one vector: its K code embeddings, concatenated and projected by `aggregation`.
    """

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.width)
        self.code_embeddings = nn.ModuleList(
            nn.Embedding(config.codebook_size, config.width) for _ in range(config.num_codebooks)
        )
        self.aggregation = nn.Linear(config.num_codebooks * config.width, config.width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.rotary_table = RotaryTable(config.grid_size, config.head_dim, config.rope_base)
        self.backbone = nn.ModuleList(
            TransformerBlock(config, causal_attention) for _ in range(config.num_layers)
        )
        self.factor_head = build_factor_head(config)
        self.classifiers = nn.ModuleList(
            nn.Linear(self.factor_head.feature_width, config.codebook_size, bias=False)
            for _ in range(config.num_codebooks)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise in place from torch's default generator.

        Linear layers and embeddings are N(0, 0.02), biases 0, norms 1, classifiers 0: so the first
        loss is ln V. Also what a model built on the meta device needs after `to_empty`.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RmsNorm):
                nn.init.ones_(module.weight)
        for classifier in self.classifiers:
            assert isinstance(classifier, nn.Linear), "the classifiers are linear layers"
            nn.init.zeros_(classifier.weight)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Predict every code from the label and the codes before it (teacher forcing).

        In training, dropouts and class dropout draw from torch's default generator.

        Args:
            codes: (B, K, h, w) int64 in [0, V).
            labels: (B,) int64 in [0, num_classes], the last being the null class.

        Returns:
            Logits, (B, K, T, V). Those of codebook i at position t depend on the label, on all
            codes of the positions before t, and, with the autoregressive head, on codes 0 to i-1
            of t.

        Raises:
            ValueError: a shape is not the config's.
        """
        self._check_shapes(codes, labels)
        embeddings = self._embed(rearrange(codes, "B K h w -> K B (h w)").unbind(0))
        hidden = self._run_backbone(embeddings, self._drop_labels(labels))
        features = self.factor_head(hidden, embeddings[:-1], self.rotary_table)
        logits = [
            classify(of_codebook)
            for classify, of_codebook in zip(self.classifiers, features.unbind(1), strict=True)
        ]
        return torch.stack(logits, dim=1)

    def embed_position(self, codes: Tensor) -> Tensor:
        """Embed one position's codes, (B, K) int64, as the backbone's next input, (B, E)."""
        return self._aggregate(self._embed(codes.unbind(1)))

    def _run_backbone(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        positions = self._aggregate([embedding[:, :-1] for embedding in embeddings])
        # Under autocast embeddings are float32 and what the projection gives is bf16: without the
        # cast the whole residual stream would be promoted to float32.
        x = torch.cat([self.class_embedding(labels)[:, None].to(positions.dtype), positions], dim=1)
        x = self.token_dropout(x)
        rotation = self.rotary_table(0, self.config.num_positions)
        for block in self.backbone:
            x = block(x, rotation)
        return x

    def _embed(self, codes: Sequence[Tensor]) -> list[Tensor]:
        return [
            embed(of_codebook)
            for embed, of_codebook in zip(self.code_embeddings, codes, strict=True)
        ]

    def _aggregate(self, embeddings: Sequence[Tensor]) -> Tensor:
        return self.aggregation(torch.cat(list(embeddings), dim=-1))

    def _drop_labels(self, labels: Tensor) -> Tensor:
        if not self.training or self.config.class_dropout == 0:
            return labels
        dropped = torch.rand(labels.shape, device=labels.device) < self.config.class_dropout
        return labels.masked_fill(dropped, self.config.null_label)

    def _check_shapes(self, codes: Tensor, labels: Tensor) -> None:
        side = self.config.grid_size
        expected = (self.config.num_codebooks, side, side)
        if codes.ndim != 4 or tuple(codes.shape[1:]) != expected:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} - expected (B, K, h, w) = (B, "
                f"{expected[0]}, {side}, {side}) - check num_codebooks and grid_size against the "
                "tokenizer's"
            )
        if labels.shape != codes.shape[:1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} - expected one per image, "
                f"({codes.shape[0]},)"
            )
