"""Which parameters of FAR decay: matrices do, vectors do not.

Source: FQGAN, arXiv 2411.16681, released training recipe.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into two optimizer groups.

    Those of two or more dimensions decay, embeddings included; biases and norms do not. Call it
    before an engine partitions the parameters: afterwards all have one dimension.

    Returns:
        The decaying group, then the other, with the keys `params` and `weight_decay` of torch's
        optimizers; within each, in the order of `model.parameters()`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # By dimension, not by name or type: the released recipe decays embeddings like matrices.
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
