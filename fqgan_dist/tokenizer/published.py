"""The released models' files: names of their parameters, and safe reading.

Ours, and the released name where S is the codebook's suffix and A, H are its adapter and head:

    branches.<name>.adapter.transformer     encoder.A.0
    branches.<name>.norm_out, .conv_out     encoder.norm_out_S, encoder.conv_out_S
    branches.<name>.quant_conv              quant_conv_S
    branches.<name>.quantizer.codebook      quantize_S.embedding.weight
    feature_heads.<name>                    H

Codebooks go by their position, so their names are free (`_LAYOUTS`): `vis`, `sem` for two; `vis`,
`sem_mid`, `sem_high` for three; no suffix for one, which is LlamaGen's layout. Inside blocks only
words differ (`_BLOCK_WORDS`, `_TRANSFORMER_WORDS`). The discriminator's keys are the same.
Source: reference/fqgan.md, sections 1.12 and 1.13, and the recorded key lists.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.errors import CheckpointError, ConfigError
from fqgan_dist.tokenizer.config import TokenizerConfig
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.weights.files import UNPICKLING_ERRORS, is_state_dict

USAGE_WINDOW = 65536
"""Length of the released quantizers' usage buffer; it is written as zeros and ignored when read."""

_WEIGHTS_ENTRIES = ("ema", "model", "state_dict")


@dataclass(frozen=True)
class _BranchNames:
    suffix: str
    adapter: str | None
    feature_head: str | None


_LAYOUTS = {
    1: (_BranchNames("", None, None),),
    2: (
        _BranchNames("_vis", "visual_head", None),
        _BranchNames("_sem", "semantic_head", "feat_pred_head"),
    ),
    3: (
        _BranchNames("_vis", "visual_head", None),
        _BranchNames("_sem_mid", "semantic_head_mid", "mid_sem_feat_pred"),
        _BranchNames("_sem_high", "semantic_head_high", "high_sem_feat_pred"),
    ),
}

_BLOCK_WORDS = {
    "levels": "conv_blocks",
    "residual_blocks": "res",
    "attention_blocks": "attn",
    "shortcut": "nin_shortcut",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
}
_TRANSFORMER_WORDS = {
    "positions": "positional_embedding",
    "norm_in": "ln_pre",
    "norm_out": "ln_post",
    "blocks": "transformer",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attention": "attn",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
    "in_proj.weight": "in_proj_weight",
    "in_proj.bias": "in_proj_bias",
}
_HEAD_WORDS = {"class_token": "class_embedding", "projection": "upscale"}


def map_to_published_key(key: str, config: TokenizerConfig) -> str:
    """Translate one of our parameter names to the released models' name.

    Raises:
        ConfigError: the released layouts have no place for such a codebook, adapter or head.
    """
    layout = _released_layout(config)
    part, _, rest = key.partition(".")
    if part not in ("branches", "feature_heads"):
        resample = "downsample" if part == "encoder" else "upsample"
        return _translate(key, {**_BLOCK_WORDS, "resample": resample})
    name, _, rest = rest.partition(".")
    position = [codebook.name for codebook in config.codebooks].index(name)
    names = layout[position]
    if part == "branches":
        return _branch_key(rest, names)
    rest = _translate(rest.removeprefix("transformer."), {**_TRANSFORMER_WORDS, **_HEAD_WORDS})
    return f"{_present(names.feature_head, name, 'feature head')}.{rest}"


def to_published_state_dict(
    state: Mapping[str, Tensor], config: TokenizerConfig
) -> dict[str, Tensor]:
    """Rename our state dict as the released code loads it, with a usage buffer per codebook."""
    published = {map_to_published_key(key, config): value for key, value in state.items()}
    for names in _released_layout(config):
        published[f"quantize{names.suffix}.codebook_used"] = torch.zeros(USAGE_WINDOW)
    return published


def from_published_state_dict(
    state: Mapping[str, Tensor], config: TokenizerConfig, *, with_feature_heads: bool = True
) -> dict[str, Tensor]:
    """Rename a released state dict to ours, and check that it is of this architecture.

    Args:
        state: released model's state dict; usage buffers are ignored.
        config: architecture.
        with_feature_heads: whether feature heads are kept; a file without them gives none.

    Returns:
        State dict of `FactorizedTokenizer(config)`, with or without feature heads.

    Raises:
        CheckpointError: keys are missing or unknown, or shapes differ.
        ConfigError: the released layouts have no place for this architecture.
    """
    with torch.device("meta"):
        expected = FactorizedTokenizer(config).state_dict()
    names = {map_to_published_key(key, config): key for key in expected}
    found = {key: value for key, value in state.items() if not key.endswith(".codebook_used")}
    heads = {key for key, ours in names.items() if ours.startswith("feature_heads.")}
    wanted = set(names) if heads & set(found) else set(names) - heads
    problems = [
        *(f"{key}: missing" for key in sorted(wanted - set(found))),
        *(f"{key}: unknown" for key in sorted(set(found) - wanted)),
        *(
            f"{key}: shape {tuple(found[key].shape)}, expected {tuple(expected[names[key]].shape)}"
            for key in sorted(wanted & set(found))
            if found[key].shape != expected[names[key]].shape
        ),
    ]
    if problems:
        raise CheckpointError(
            f"released weights do not fit the tokenizer's config in {len(problems)} keys: "
            f"{'; '.join(problems[:3])}; check codebooks, channel_multipliers and feature sizes"
        )
    kept = wanted if with_feature_heads else wanted - heads
    return {names[key]: value for key, value in found.items() if key in kept}


def read_published_file(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a released .pt file: of `ema` if there, else `model` or `state_dict`.

    Only tensors and plain values are unpickled, and the argparse.Namespace that the files carry.

    Raises:
        CheckpointError: the file cannot be read so, or holds no state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(
            f"{path}: cannot be read as a released model: {error}; expected a .pt file of tensors"
        ) from error
    entries = content if isinstance(content, dict) else {}
    weights = next((entries[name] for name in _WEIGHTS_ENTRIES if name in entries), None)
    if not is_state_dict(weights):
        raise CheckpointError(
            f"{path}: holds no state dict under 'ema', 'model' or 'state_dict'; "
            "name a released model"
        )
    return dict(weights)


def _branch_key(rest: str, names: _BranchNames) -> str:
    part, _, tail = rest.partition(".")
    match part:
        case "adapter":
            tail = _translate(tail.removeprefix("transformer."), _TRANSFORMER_WORDS)
            return f"encoder.{_present(names.adapter, rest, 'adapter')}.0.{tail}"
        case "quantizer":
            return f"quantize{names.suffix}.embedding.weight"
        case "quant_conv":
            return f"quant_conv{names.suffix}.{tail}"
        case _:
            return f"encoder.{part}{names.suffix}.{tail}"


def _translate(key: str, words: Mapping[str, str]) -> str:
    # Whole dotted parts only: `out` must not touch `norm_out`.
    for ours, theirs in words.items():
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key


def _present(name: str | None, key: str, what: str) -> str:
    if name is None:
        raise ConfigError(f"{key}: the released layout has no {what} at this codebook's position")
    return name


def _released_layout(config: TokenizerConfig) -> tuple[_BranchNames, ...]:
    layout = _LAYOUTS.get(config.num_codebooks)
    if layout is None:
        raise ConfigError(
            f"tokenizer.codebooks: {config.num_codebooks} codebooks have no released layout; "
            "expected 1 to 3"
        )
    return layout
