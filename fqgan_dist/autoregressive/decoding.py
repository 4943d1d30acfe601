"""Step-by-step evaluation of FAR with key-value caches.

The same function as the teacher-forced pass, one position and one codebook at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fqgan_dist.autoregressive.blocks import TransformerBlock, build_caches
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

# Letters: B batch, K codebooks, T positions, E width, F channels of a feature vector.


class CachedDecoder:
    """Decode B sequences of a model in evaluation mode.

    All caches are allocated here, once: T entries per backbone block, and K per block of the factor
    head, which every position overwrites. Per position, call `begin_position` and then `features`
    for codebooks 0 to K-1, in this order.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, model: FactorizedTransformer, batch_size: int) -> None:
        if model.training:
            raise ValueError(
                "the model is in training mode - decoding has no dropout - call model.eval() first"
            )
        self._model = model
        weight = model.class_embedding.weight
        dtype = _compute_dtype(weight)
        self._backbone_caches = build_caches(
            model.config,
            num_layers=len(model.backbone),
            batch_size=batch_size,
            num_tokens=model.config.num_positions,
            dtype=dtype,
            device=weight.device,
        )
        self._head_caches = model.factor_head.build_caches(batch_size, dtype, weight.device)
        self._hidden: Tensor | None = None

    def begin_position(self, position: int, inputs: Tensor) -> None:
        """Run the backbone on the next token.

        Args:
            position: in [0, T), one more than at the call before.
            inputs: (B, E), the class embedding for position 0, then `model.embed_position` of the
                codes of the position before.
        """
        rotation = self._model.rotary_table(position, position + 1)
        x = inputs
        for block, cache in zip(self._model.backbone, self._backbone_caches, strict=True):
            assert isinstance(block, TransformerBlock), "the backbone holds transformer blocks only"
            x = block.decode(x, rotation, cache, position)
        self._hidden = x

    def features(self, codebook: int, previous_codes: Tensor | None) -> Tensor:
        """Compute what the classifier of a codebook takes at the current position.

        Args:
            codebook: in [0, K), one more than at the call before, 0 after `begin_position`.
            previous_codes: this position's codes in the codebook before, (B,) int64; None for
                codebook 0.

        Returns:
            (B, F).
        """
        model = self._model
        assert self._hidden is not None, "begin_position comes first"
        inputs = self._hidden
        if previous_codes is not None and model.factor_head.is_autoregressive:
            inputs = model.code_embeddings[codebook - 1](previous_codes)
        return model.factor_head.decode(inputs, codebook, model.rotary_table, self._head_caches)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype
