"""What is counted on the meta device is what a real pass keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.config import load_config
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.footprint import META, SavedBytes, imitated_gpu
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.precision import full_precision

TOLERANCE = 2e-3
"""A fused kernel keeps 24 bytes of random state per attention; the CPU's attention of a single head
is not fused and keeps scaled copies of its small queries and keys."""

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"


def count(module: nn.Module, *inputs: Tensor) -> int:
    counter = SavedBytes([module])
    with counter.counting():
        output = module(*inputs)
    del output
    return counter.total


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(TINY, [], RunConfig)


def test_the_tokenizer_keeps_on_the_meta_device_what_it_keeps_on_the_cpu(config: RunConfig) -> None:
    model = FactorizedTokenizer(config.tokenizer.model).train()
    images = torch.rand(2, 3, 32, 32)
    real = count(model, images)
    with imitated_gpu(bf16=False):
        planned = count(model.to(META), images.to(META))
    assert planned == pytest.approx(real, rel=TOLERANCE)


def test_far_keeps_on_the_meta_device_what_it_keeps_on_the_cpu(config: RunConfig) -> None:
    model = FactorizedTransformer(config.autoregressive.model).train()
    codes, labels = torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    real = count(model, codes, labels)
    with imitated_gpu(bf16=False):
        planned = count(model.to(META), codes.to(META), labels.to(META))
    assert planned == pytest.approx(real, rel=TOLERANCE)


def test_each_storage_counts_once_and_parameters_do_not() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.empty(64, device=META))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale) * x

    x = torch.empty(64, device=META, requires_grad=True)
    assert count(Products(), x) == 2 * 64 * 4  # x itself, and x * scale


def test_bf16_keeps_halves_of_matrix_products_and_whole_norms() -> None:
    x = torch.empty(8, 32, device=META, requires_grad=True)
    linear = nn.Linear(32, 16, device=META)
    with imitated_gpu(bf16=True):
        assert linear(x).dtype == torch.bfloat16
        assert functional.layer_norm(linear(x), (16,)).dtype == torch.float32
        # bf16 copies of the input and of the weight.
        assert count(linear, x) == 2 * (8 * 32 + 32 * 16)


def test_blocks_in_full_precision_stay_so() -> None:
    x = torch.empty(8, 32, device=META)
    with imitated_gpu(bf16=True), full_precision(META):
        assert (x @ x.T).dtype == torch.float32


def test_attention_keeps_no_matrix_of_scores() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.empty(1, 1, 4096, 8, device=META, requires_grad=True)
    with imitated_gpu(bf16=False):
        kept = count(Attention(), x)
    assert kept < 4096 * 4096 * 4 / 100
    assert kept >= 2 * 4096 * 8 * 4  # input and output
