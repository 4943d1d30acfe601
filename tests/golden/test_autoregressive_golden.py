"""FAR is the released FAR: names, shapes, sizes, logits, loss, gradients and greedy decoding.

Vectors recorded from the released implementation; `published_weights` is the recording's fill rule.
"""

from __future__ import annotations

import ast
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from fqgan_dist.autoregressive.blocks import RmsNorm
from fqgan_dist.autoregressive.config import (
    AutoregressiveConfig,
    AutoregressiveHeadConfig,
    SamplingConfig,
)
from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.autoregressive.published import (
    from_published_state_dict,
    map_published_key,
    to_published_state_dict,
)
from fqgan_dist.autoregressive.sampling import generate_codes
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

GOLDEN = Path(__file__).parent
NUM_CODEBOOKS = {"dual": 2, "triple": 3}
SIZES = {
    "FAR-B": {"width": 1024, "num_layers": 24, "num_heads": 16, "head_layers": 3},
    "FAR-L": {"width": 1280, "num_layers": 36, "num_heads": 20, "head_layers": 4},
}
MODELS = [(variant, size) for variant in NUM_CODEBOOKS for size in SIZES]


def build_full_size(variant: str, size: str) -> FactorizedTransformer:
    sizes = dict(SIZES[size])
    head = AutoregressiveHeadConfig(num_layers=sizes.pop("head_layers"))
    config = AutoregressiveConfig(
        num_codebooks=NUM_CODEBOOKS[variant],
        codebook_size=16384,
        grid_size=16,
        factor_head=head,
        **sizes,
    )
    with torch.device("meta"):
        return FactorizedTransformer(config)


def read_recorded_shapes(variant: str, size: str) -> dict[str, tuple[int, ...]]:
    text = (GOLDEN / "state_dict" / f"sd_far_{variant}_{size}.txt").read_text()
    lines = (line.split("\t") for line in text.splitlines() if line)
    return {key: ast.literal_eval(shape) for key, shape in lines}


def published_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    weights = {}
    for key, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(key.encode()))
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) >= 2:
            values = values / np.sqrt(np.prod(shape[1:]))
        elif key.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        weights[key] = torch.from_numpy(values.astype(np.float32))
    return weights


def build_tiny(variant: str) -> FactorizedTransformer:
    config = AutoregressiveConfig(
        num_codebooks=NUM_CODEBOOKS[variant],
        codebook_size=512,
        grid_size=4,
        num_classes=10,
        width=128,
        num_layers=3,
        num_heads=4,
        factor_head=AutoregressiveHeadConfig(num_layers=2),
        token_dropout=0,
        residual_dropout=0,
        ffn_dropout=0,
        class_dropout=0,
        ffn_multiple_of=64,
    )
    model = FactorizedTransformer(config)
    released = to_published_state_dict(model.state_dict())
    weights = published_weights({key: tuple(value.shape) for key, value in released.items()})
    model.load_state_dict(from_published_state_dict(weights))
    return model


def read_grids(recorded: dict[str, Tensor], name: str, variant: str) -> Tensor:
    grids = [recorded[f"{name}.{i + 1}"] for i in range(NUM_CODEBOOKS[variant])]
    return rearrange(torch.stack(grids, dim=1).long(), "B K (h w) -> B K h w", h=4)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=list(NUM_CODEBOOKS))
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recorded(variant: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"far_{variant}_tiny.safetensors")


@pytest.mark.parametrize(("variant", "size"), MODELS)
def test_state_dict_has_the_released_keys_and_shapes(variant: str, size: str):
    state = to_published_state_dict(build_full_size(variant, size).state_dict())
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == read_recorded_shapes(variant, size)


@pytest.mark.parametrize(("variant", "size"), MODELS)
def test_released_keys_map_onto_the_state_dict_and_back(variant: str, size: str):
    state = build_full_size(variant, size).state_dict()
    there_and_back = from_published_state_dict(to_published_state_dict(state))
    assert list(there_and_back) == list(state)


@pytest.mark.parametrize(
    ("variant", "size", "total", "without_aggregation"),
    [
        ("dual", "FAR-B", 417_104_896, 415_006_720),
        ("dual", "FAR-L", 901_195_520, 897_917_440),
        ("triple", "FAR-B", 451_707_904, 448_561_152),
        ("triple", "FAR-L", 944_776_960, 939_860_480),
    ],
)
def test_parameter_counts(variant: str, size: str, total: int, without_aggregation: int):
    model = build_full_size(variant, size)
    aggregation = sum(p.numel() for p in model.aggregation.parameters())
    counted = sum(p.numel() for p in model.parameters())
    assert (counted, counted - aggregation) == (total, without_aggregation)


@pytest.mark.parametrize(("size", "ffn_width"), [("FAR-B", 2816), ("FAR-L", 3584)])
def test_full_size_widths(size: str, ffn_width: int):
    config = build_full_size("dual", size).config
    assert (config.head_dim, config.ffn_width, config.num_positions) == (64, ffn_width, 256)


def test_every_norm_has_the_released_eps():
    norms = [m for m in build_full_size("dual", "FAR-B").modules() if isinstance(m, RmsNorm)]
    assert len(norms) == 2 * 24 + 2 * 3 + 1
    assert {norm.eps for norm in norms} == {1e-5}


def test_first_loss_is_log_of_the_codebook_size(variant: str):
    model = build_tiny(variant)
    model.reset_parameters()
    codes = torch.randint(512, (2, NUM_CODEBOOKS[variant], 4, 4))
    losses = compute_code_losses(model(codes, torch.tensor([0, 10])), codes)
    assert losses.tolist() == pytest.approx([math.log(512)] * NUM_CODEBOOKS[variant], abs=1e-6)


# Tolerances are those that an independent fp32 CPU implementation reached: logits 2e-6, losses
# 2e-6, gradient norms 1e-5.
@torch.no_grad()
def test_logits_and_loss(variant: str, recorded: dict[str, Tensor]):
    codes = read_grids(recorded, "codes", variant)
    logits = build_tiny(variant)(codes, torch.tensor([0, 3, 9, 10]))
    for codebook in range(NUM_CODEBOOKS[variant]):
        assert relative_error(logits[:, codebook], recorded[f"logits.{codebook + 1}"]) < 2e-6
    loss = compute_code_losses(logits, codes).mean()
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=2e-6)


def test_gradient_norms(variant: str, recorded: dict[str, Tensor]):
    model = build_tiny(variant).train()
    codes = read_grids(recorded, "codes", variant)
    compute_code_losses(model(codes, torch.tensor([0, 3, 9, 10])), codes).mean().backward()
    norms = {key: value for key, value in recorded.items() if key.startswith("grad_norm.")}
    assert len(norms) >= 7
    for key, expected in norms.items():
        name = map_published_key(key.removeprefix("grad_norm."))
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(expected.item(), rel=1e-5), name


def test_greedy_codes_with_guidance(variant: str, recorded: dict[str, Tensor]):
    codes = generate_codes(
        build_tiny(variant).eval(),
        torch.tensor([1, 4]),
        torch.zeros(2, 16, NUM_CODEBOOKS[variant]),
        SamplingConfig(guidance_scale=2.0, top_k=1),
    )
    assert codes.equal(read_grids(recorded, "greedy_cfg2", variant))
