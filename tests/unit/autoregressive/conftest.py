"""A small random FAR of each kind, in float64 so that equal functions are equal numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fqgan_dist.autoregressive.config import (
    AutoregressiveConfig,
    AutoregressiveHeadConfig,
    FactorHeadConfig,
    LinearHeadConfig,
    MlpHeadConfig,
)
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]

HEADS: dict[str, FactorHeadConfig] = {
    "autoregressive": AutoregressiveHeadConfig(num_layers=2),
    "linear": LinearHeadConfig(),
    "mlp": MlpHeadConfig(hidden_multiple=2),
}


@pytest.fixture(params=list(HEADS))
def kind(request: pytest.FixtureRequest) -> str:
    """Run the test once per factor head."""
    return request.param


@pytest.fixture
def build_model() -> BuildModel:
    """Build a seeded model; settings given as keywords replace the small defaults."""

    def build(kind: str = "autoregressive", **changes: object) -> FactorizedTransformer:
        settings = {
            "num_codebooks": 3,
            "codebook_size": 11,
            "grid_size": 3,
            "num_classes": 5,
            "width": 16,
            "num_layers": 2,
            "num_heads": 2,
            "ffn_multiple_of": 8,
            "factor_head": HEADS[kind],
        }
        config = AutoregressiveConfig.model_validate(settings | changes)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = FactorizedTransformer(config).double()
            for parameter in model.parameters():
                # Large enough that every path, the zero-initialised classifiers included, matters.
                torch.nn.init.normal_(parameter, std=0.4)
        return model.eval()

    return build
