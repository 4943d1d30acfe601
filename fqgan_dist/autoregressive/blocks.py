"""Transformer blocks of FAR's backbone and factor head.

Source: FQGAN, arXiv 2411.16681, released FAR; the blocks are LlamaGen's, arXiv 2406.06525.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from fqgan_dist.autoregressive.config import AutoregressiveConfig
from fqgan_dist.autoregressive.rotary import Rotation, rotate

# Letters: B batch, S sequence length, E width, N heads, d channels of one head.

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of queries, keys, values, each (B, S, N, d), to (B, S, N, d)."""


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of one block for the tokens decoded so far, written in place.

    Attributes:
        keys, values: (B, N, S, d), S the most tokens that it holds.
    """

    keys: Tensor
    values: Tensor


class RmsNorm(nn.Module):
    """Divide by the root mean square in float32, cast back, then scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return functional.rms_norm(precise, (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and no biases."""

    def __init__(self, config: AutoregressiveConfig, attention_fn: AttentionFn) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_fn = attention_fn
        # One matrix for queries, keys and values in this order, each laid out (N, d).
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Attend within whole sequences, (B, S, E) to (B, S, E)."""
        query, key, value = self._project(x)
        attended = self.attention_fn(rotate(query, rotation), rotate(key, rotation), value)
        return self.dropout(self.output(rearrange(attended, "B S N d -> B S (N d)")))

    def decode(self, x: Tensor, rotation: Rotation, cache: KeyValueCache, token: int) -> Tensor:
        """Append token number `token`, (B, E), to the cache and attend from it to all so far."""
        query, key, value = self._project(x[:, None])
        cache.keys[:, :, token] = rotate(key, rotation)[:, 0]
        cache.values[:, :, token] = value[:, 0]
        # Rotated queries are float32, and the cache has the type that the rest computes in: torch's
        # attention takes one type for all three.
        attended = functional.scaled_dot_product_attention(
            rotate(query, rotation).to(cache.keys.dtype).transpose(1, 2),
            cache.keys[:, :, : token + 1],
            cache.values[:, :, : token + 1],
        )
        return self.output(rearrange(attended, "B N 1 d -> B (N d)"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = rearrange(self.qkv(x), "B S (three N d) -> three B S N d", three=3, N=self.num_heads)
        query, key, value = qkv.unbind(0)
        return query, key, value


class FeedForward(nn.Module):
    """SwiGLU without biases: down(silu(gate x) * up x)."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last dimension."""
        return self.dropout(self.down(functional.silu(self.gate(x)) * self.up(x)))


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: AutoregressiveConfig, attention_fn: AttentionFn) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.width, config.norm_eps)
        self.attention = Attention(config, attention_fn)
        self.ffn_norm = RmsNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Transform whole sequences, (B, S, E) to (B, S, E)."""
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.feed_forward(self.ffn_norm(x))

    def decode(self, x: Tensor, rotation: Rotation, cache: KeyValueCache, token: int) -> Tensor:
        """Transform token number `token`, (B, E) to (B, E), in the light of the cached ones."""
        x = x + self.attention.decode(self.attention_norm(x), rotation, cache, token)
        return x + self.feed_forward(self.ffn_norm(x))


def build_caches(
    config: AutoregressiveConfig,
    *,
    num_layers: int,
    batch_size: int,
    num_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KeyValueCache]:
    """Allocate the caches of a stack of blocks, once for a whole generation."""
    shape = (batch_size, config.num_heads, num_tokens, config.head_dim)
    return [
        KeyValueCache(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )
        for _ in range(num_layers)
    ]


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally over long sequences, (B, S, N, d), with the fused kernels of torch."""
    attended = functional.scaled_dot_product_attention(
        query.to(value.dtype).transpose(1, 2),
        key.to(value.dtype).transpose(1, 2),
        value.transpose(1, 2),
        is_causal=True,
    )
    return attended.transpose(1, 2)


def short_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend causally over a handful of tokens, (B, S, N, d), as plain elementwise arithmetic."""
    # The factor head attends over K tokens at each of B x T positions, and fused kernels pad such
    # sequences to 64 or 128 tokens. These S (S + 1) / 2 products are exact in float32, 1.4 times as
    # fast as torch's attention on a CPU for K=3 forward and backward, and 2.3 times compiled.
    queries, keys, values = query.unbind(1), key.unbind(1), value.unbind(1)
    scale = query.shape[-1] ** -0.5
    # The first token sees itself only.
    attended = [values[0]]
    for last in range(1, len(queries)):
        logits = [(queries[last] * keys[token]).sum(-1) for token in range(last + 1)]
        weights = (torch.stack(logits, dim=-1) * scale).softmax(-1).unsqueeze(-2).unbind(-1)
        mixed = weights[0] * values[0]
        for token in range(1, last + 1):
            mixed = torch.addcmul(mixed, weights[token], values[token].to(mixed.dtype))
        attended.append(mixed.to(value.dtype))
    return torch.stack(attended, dim=1)
