from __future__ import annotations

from collections.abc import Callable

import torch

from fqgan_dist.autoregressive.blocks import TransformerBlock
from fqgan_dist.autoregressive.heads import AutoregressiveHead, MlpHead
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]


def features_of(model: FactorizedTransformer, hidden: torch.Tensor) -> torch.Tensor:
    embeddings = [torch.zeros_like(hidden)] * (model.config.num_codebooks - 1)
    return model.factor_head(hidden, embeddings, model.rotary_table)


def test_linear_head_gives_every_codebook_the_normalised_hidden_state(build_model: BuildModel):
    model = build_model("linear")
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    expected = model.factor_head.norm(hidden)
    for features in features_of(model, hidden).unbind(1):
        assert features.equal(expected)


def test_mlp_head_gives_every_codebook_its_own_hidden_layer(build_model: BuildModel):
    model = build_model("mlp")
    head = model.factor_head
    assert isinstance(head, MlpHead)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    features = features_of(model, hidden)
    assert features.shape == (2, 3, 9, 32)
    for codebook, layer in enumerate(head.hidden_layers):
        expected = torch.nn.functional.silu(layer(head.norm(hidden)))
        torch.testing.assert_close(features[:, codebook], expected)


def test_autoregressive_head_takes_the_raw_hidden_state(build_model: BuildModel):
    # The hidden state's query and key are zero, so it attends to itself alone: block by block, the
    # first feature is value projection and feed-forward of the un-normalised hidden state.
    model = build_model(num_codebooks=2)
    head = model.factor_head
    assert isinstance(head, AutoregressiveHead)
    hidden = 5 * torch.randn(2, 9, 16, dtype=torch.float64)
    x = hidden
    for block in head.blocks:
        assert isinstance(block, TransformerBlock)
        value = block.attention.qkv(block.attention_norm(x))[..., 32:]
        x = x + block.attention.output(value)
        x = x + block.feed_forward(block.ffn_norm(x))
    torch.testing.assert_close(features_of(model, hidden)[:, 0], head.norm(x))


def test_only_the_autoregressive_head_is_autoregressive(build_model: BuildModel, kind: str):
    head = build_model(kind).factor_head
    assert head.is_autoregressive == (kind == "autoregressive")
    caches = head.build_caches(2, torch.float32, torch.device("cpu"))
    assert len(caches) == (2 if kind == "autoregressive" else 0)
    assert all(cache.keys.shape == (2, 2, 3, 8) for cache in caches)
