"""Names of the released FAR weights and ours; the tensors themselves are the same.

Source: state dicts of the released FQGAN code, arXiv 2411.16681.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# (released, ours); `#` stands for an index counted from 0, `+` for one counted from 1 by the
# release and from 0 by us.
_NAMES = (
    ("cls_embedding.embedding_table.weight", "class_embedding.weight"),
    ("tok_embeddings_+.weight", "code_embeddings.+.weight"),
    ("aggregation_layer.weight", "aggregation.weight"),
    ("aggregation_layer.bias", "aggregation.bias"),
    ("norm.weight", "factor_head.norm.weight"),
    ("output_+.weight", "classifiers.+.weight"),
    *(
        (f"{released_stack}.#.{released}.weight", f"{our_stack}.#.{ours}.weight")
        for released_stack, our_stack in (("layers", "backbone"), ("ar_head", "factor_head.blocks"))
        for released, ours in (
            ("attention_norm", "attention_norm"),
            ("attention.wqkv", "attention.qkv"),
            ("attention.wo", "attention.output"),
            ("ffn_norm", "ffn_norm"),
            ("feed_forward.w1", "feed_forward.gate"),
            ("feed_forward.w3", "feed_forward.up"),
            ("feed_forward.w2", "feed_forward.down"),
        )
    ),
)

_WRAPPERS = ("model", "module", "state_dict")
"""Keys under which released training checkpoints (DDP, DeepSpeed) keep the weights."""


def map_published_key(key: str) -> str:
    """Translate a released key to ours.

    Raises:
        ValueError: the released FAR has no such key.
    """
    return _translate(key, source=0, offset=-1)


def map_to_published_key(key: str) -> str:
    """Translate our key to the released one.

    Raises:
        ValueError: the released FAR has no counterpart, as for the linear and MLP heads.
    """
    return _translate(key, source=1, offset=1)


def from_published_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename released weights so that `FactorizedTransformer.load_state_dict` takes them."""
    return {map_published_key(key): tensor for key, tensor in state.items()}


def to_published_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights as the released sampler expects them."""
    return {map_to_published_key(key): tensor for key, tensor in state.items()}


def find_published_weights(
    checkpoint: Mapping[str, Tensor | Mapping[str, Tensor]],
) -> Mapping[str, Tensor]:
    """Find the weights in a released checkpoint: under `model`, `module`, `state_dict`, or bare.

    Raises:
        ValueError: none of them holds tensors.
    """
    for name in _WRAPPERS:
        inner = checkpoint.get(name)
        if isinstance(inner, Mapping):
            return inner
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(checkpoint):
        raise ValueError(
            f"a checkpoint with the keys {sorted(checkpoint)[:8]!r} holds no weights - expected "
            f"one of {', '.join(_WRAPPERS)}, or parameters at the top level"
        )
    return tensors


def _translate(key: str, *, source: int, offset: int) -> str:
    for names in _NAMES:
        template, result = names[source], names[1 - source]
        pattern = re.escape(template).replace(r"\#", r"(\d+)").replace(r"\+", r"(\d+)")
        match = re.fullmatch(pattern, key)
        if match is None:
            continue
        if "+" in template:
            return result.replace("+", str(int(match[1]) + offset))
        return result.replace("#", match[1]) if "#" in template else result
    owner = ("the released FAR", "this model")[source]
    raise ValueError(
        f"{key!r} is no weight of {owner} with a counterpart - expected one like "
        f"{_NAMES[0][source]!r} or {_NAMES[1][source]!r} - only models with the autoregressive "
        "head were released"
    )
