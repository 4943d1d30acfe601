from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fqgan_dist.autoregressive.blocks import (
    AttentionFn,
    FeedForward,
    RmsNorm,
    build_caches,
    causal_attention,
    short_causal_attention,
)
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]


def attend_slowly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, (B, S, N, d), from the definition."""
    logits = torch.einsum("bind,bjnd->bnij", query, key) / query.shape[-1] ** 0.5
    unseen = torch.ones(logits.shape[-2:]).triu(1).bool()
    weights = logits.masked_fill(unseen, -torch.inf).softmax(-1)
    return torch.einsum("bnij,bjnd->bind", weights, value)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("attention_fn", [causal_attention, short_causal_attention])
def test_attention_and_its_gradients_are_the_definition(attention_fn: AttentionFn, num_tokens: int):
    torch.manual_seed(0)
    shape = (3, 4, num_tokens, 2, 8)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape[1:], dtype=torch.float64)
    expected = attend_slowly(*inputs.unbind(0))
    actual = attention_fn(*inputs.unbind(0))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), inputs)[0],
        torch.autograd.grad((expected * weights).sum(), inputs)[0],
    )


def test_short_attention_keeps_the_type_of_the_values():
    query = torch.randn(2, 3, 1, 4)
    assert short_causal_attention(query, query, query.bfloat16()).dtype == torch.bfloat16


def test_rms_norm_is_computed_in_float32_cast_back_then_scaled():
    norm = RmsNorm(4, eps=1e-5)
    torch.nn.init.constant_(norm.weight, 1.7)
    x = torch.tensor([[3.0, -1.0, 0.5, 100.0], [1e-3, 1e-3, -1e-3, 0.0]]).bfloat16()
    precise = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.float32
    assert norm(x).equal(precise.bfloat16() * norm.weight)


def test_feed_forward_is_swiglu(build_model: BuildModel):
    model = build_model()
    layer = FeedForward(model.config).double().eval()
    x = torch.randn(5, 16, dtype=torch.float64)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (functional.silu(gate) * up) @ layer.down.weight.T)


def test_caches_hold_every_token_of_every_layer(build_model: BuildModel):
    config = build_model().config
    caches = build_caches(
        config,
        num_layers=4,
        batch_size=3,
        num_tokens=9,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert len(caches) == 4
    assert {(cache.keys.shape, cache.values.dtype) for cache in caches} == {
        (torch.Size([3, 2, 9, 8]), torch.bfloat16)
    }
