from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fqgan_dist.autoregressive.published import (
    find_published_weights,
    from_published_state_dict,
    map_published_key,
    map_to_published_key,
    to_published_state_dict,
)
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("cls_embedding.embedding_table.weight", "class_embedding.weight"),
        ("tok_embeddings_1.weight", "code_embeddings.0.weight"),
        ("aggregation_layer.bias", "aggregation.bias"),
        ("layers.11.attention.wqkv.weight", "backbone.11.attention.qkv.weight"),
        ("ar_head.2.feed_forward.w3.weight", "factor_head.blocks.2.feed_forward.up.weight"),
        ("norm.weight", "factor_head.norm.weight"),
        ("output_3.weight", "classifiers.2.weight"),
    ],
)
def test_names_translate_both_ways(released: str, ours: str):
    assert map_published_key(released) == ours
    assert map_to_published_key(ours) == released


@pytest.mark.parametrize("key", ["freqs_cis", "layers.x.ffn_norm.weight", "output_1.weight2"])
def test_unknown_released_key_is_refused(key: str):
    with pytest.raises(ValueError, match=f"'{key}' is no weight of the released FAR"):
        map_published_key(key)


def test_mlp_head_has_no_released_counterpart(build_model: BuildModel):
    with pytest.raises(ValueError, match=r"factor_head.hidden_layers.0.weight"):
        to_published_state_dict(build_model("mlp").state_dict())


def test_released_weights_load_and_compute_the_same(build_model: BuildModel):
    model, other = build_model(), build_model()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    released = to_published_state_dict(model.state_dict())
    other.load_state_dict(from_published_state_dict(released))
    codes, labels = torch.zeros(1, 3, 3, 3, dtype=torch.int64), torch.tensor([1])
    assert other(codes, labels).equal(model(codes, labels))


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
def test_weights_are_found_under_the_released_wrappers(wrapper: str):
    weights = {"norm.weight": torch.ones(2)}
    assert find_published_weights({wrapper: weights, "steps": {}}) is weights


def test_bare_weights_are_found():
    weights = {"norm.weight": torch.ones(2)}
    assert find_published_weights(weights) == weights


@pytest.mark.parametrize("checkpoint", [{}, {"steps": {}}])
def test_a_file_without_weights_is_refused(checkpoint: dict[str, dict[str, torch.Tensor]]):
    with pytest.raises(ValueError, match="holds no weights"):
        find_published_weights(checkpoint)
