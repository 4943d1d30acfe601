"""The tokenizer is the released FQGAN: names, shapes, sizes, codes, images, losses, gradients.

Vectors recorded from the released implementation on weights that anybody can make again
(`recorded_weight` is the rule). Random weights make near-ties, and one flipped code moves all that
comes after it: so codes are compared from the recorded maps, everything later with recorded codes.
"""

from __future__ import annotations

import ast
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fqgan_dist.tokenizer.config import CodebookConfig, DiscriminatorConfig, TokenizerConfig
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.losses import (
    disentanglement_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    info_nce_loss,
)
from fqgan_dist.tokenizer.model import FactorizedTokenizer, TokenizerOutput
from fqgan_dist.tokenizer.published import (
    from_published_state_dict,
    map_to_published_key,
    to_published_state_dict,
)
from fqgan_dist.tokenizer.quantizer import nearest_codes

GOLDEN = Path(__file__).parent
VISUAL = CodebookConfig(name="visual")
CODEBOOKS = {
    "dual": (VISUAL, CodebookConfig(name="semantic", teacher="clip", feature_dim=1024)),
    "triple": (
        VISUAL,
        CodebookConfig(name="semantic_mid", teacher="dinov2", feature_dim=384),
        CodebookConfig(name="semantic_high", teacher="clip", feature_dim=768),
    ),
}
MULTIPLIERS = {16: (1, 1, 2, 2, 4), 8: (1, 2, 2, 4)}
BRANCHES = {"dual": ("vis", "sem"), "triple": ("vis", "sem_mid", "sem_high")}
# Recorded name of the feature head of each teacher.
HEADS = {
    "dual": {"clip": "feat_pred_head"},
    "triple": {"dinov2": "mid_sem_feat_pred", "clip": "high_sem_feat_pred"},
}
# Losses are recorded for the first two, the discriminator for the first. pytest groups tests by the
# position in such lists: each variant's model is built once because all of them start alike.
VARIANTS = [("triple", 16), ("dual", 16), ("triple", 8), ("dual", 8)]
# reference/fqgan.md, section 1.13: with feature heads, without.
PARAMETER_COUNTS = {
    ("dual", 16): (150_410_131, 111_294_355),
    ("triple", 16): (159_295_515, 131_657_883),
    ("dual", 8): (150_209_427, 110_307_219),
    ("triple", 8): (159_586_331, 131_063_963),
}


def config_of(kind: str, downsample: int) -> TokenizerConfig:
    return TokenizerConfig(channel_multipliers=MULTIPLIERS[downsample], codebooks=CODEBOOKS[kind])


def recorded_shapes(name: str) -> dict[str, tuple[int, ...]]:
    lines = (GOLDEN / "state_dict" / f"{name}.txt").read_text().splitlines()
    return {key: ast.literal_eval(shape) for key, shape in (line.split("\t") for line in lines)}


def recorded_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    values = torch.from_numpy(np.asarray(generator.standard_normal(shape), dtype=np.float32))
    if len(shape) >= 2:
        return values / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * values if key.endswith("weight") else 0.1 * values


def recorded_images(count: int) -> Tensor:
    generator = np.random.RandomState(zlib.crc32(b"image"))
    coarse = torch.from_numpy(generator.uniform(-1, 1, (count, 3, 8, 8)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(256, 256), mode="bilinear", align_corners=False)
    noise = generator.uniform(-1, 1, (count, 3, 256, 256)).astype(np.float32)
    return (smooth + 0.1 * torch.from_numpy(noise)).clamp(-1, 1)


def build_recorded(kind: str, downsample: int) -> FactorizedTokenizer:
    config = config_of(kind, downsample)
    shapes = recorded_shapes(f"sd_{kind}_VQ-{downsample}_clip")
    weights = {key: recorded_weight(key, shape) for key, shape in shapes.items()}
    with torch.device("meta"):
        model = FactorizedTokenizer(config)
    model.load_state_dict(from_published_state_dict(weights, config), assign=True)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach().reshape(expected.shape) - expected).abs().max()
    return (difference / expected.abs().max()).item()


@dataclass(frozen=True)
class Recorded:
    """One variant's recorded vectors beside one pass of our model with the recorded codes."""

    kind: str
    vectors: dict[str, Tensor]
    model: FactorizedTokenizer
    images: Tensor
    codes: Tensor
    maps: dict[str, Tensor]
    output: TokenizerOutput

    @property
    def branches(self) -> tuple[str, ...]:
        return BRANCHES[self.kind]


def name_variant(variant: tuple[str, int]) -> str:
    return "{}_f{}".format(*variant)


_MORE = pytest.mark.full("the other released models; the largest is held always")


def as_parameter(variant: tuple[str, int]) -> Any:
    """Give a variant as a parameter; the largest covers what all have."""
    marks = () if variant == ("triple", 16) else _MORE
    return pytest.param(variant, id=name_variant(variant), marks=marks)


def with_variants(variants: list[tuple[str, int]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("recorded", [*map(as_parameter, variants)], indirect=True)


@pytest.fixture(scope="module", params=[*map(as_parameter, VARIANTS)])
def recorded(request: pytest.FixtureRequest) -> Recorded:
    kind, downsample = request.param
    vectors = load_file(GOLDEN / f"tokenizer_{kind}_f{downsample}.safetensors")
    model = build_recorded(kind, downsample)
    codes = torch.stack([vectors[f"codes.{branch}"].long() for branch in BRANCHES[kind]], dim=1)
    images = recorded_images(len(codes))
    has_losses = "loss.total" in vectors
    # Gradients of all weights would double the time; the recorded ones are those of a few.
    wanted = {name.removeprefix("grad_norm.") for name in vectors if name.startswith("grad_norm.")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(map_to_published_key(name, model.config) in wanted)
    maps: dict[str, Tensor] = {}
    for branch, module in zip(BRANCHES[kind], model.branches.values(), strict=True):
        module.register_forward_hook(
            lambda _module, _inputs, result, branch=branch: maps.update({branch: result.detach()})
        )
    model.train(has_losses)
    with torch.set_grad_enabled(has_losses):
        output = model(images, codes=codes)
    return Recorded(kind, vectors, model, images, codes, maps, output)


@pytest.fixture(scope="module")
def losses(recorded: Recorded) -> dict[str, Tensor]:
    """Our losses, named and weighted as recorded; their gradients are in the model."""
    output = recorded.output
    found = {
        "mse": F.mse_loss(output.reconstruction, recorded.images),
        "disentanglement": 0.1 * disentanglement_loss(output.quantized),
    }
    for index, branch in enumerate(recorded.branches):
        found[f"codebook.{branch}"] = output.codebook_loss[index]
        found[f"commitment.{branch}"] = 0.25 * output.commitment_loss[index]
        found[f"entropy.{branch}"] = 0.03 * output.entropy_loss[index]
    total = torch.stack(list(found.values())).sum()
    for teacher, head in HEADS[recorded.kind].items():
        predicted = output.class_tokens[teacher]
        features = recorded_weight(f"teacher.{head}", tuple(predicted.shape))
        found[f"infonce.{head}"] = info_nce_loss(predicted, features)
        total = total + 0.5 * found[f"infonce.{head}"]
    total.backward()
    return {**found, "total": total}


@pytest.mark.parametrize("with_heads", [True, False], ids=["heads", "no_heads"])
@pytest.mark.parametrize(("kind", "downsample"), VARIANTS)
def test_released_names_and_shapes(kind: str, downsample: int, with_heads: bool) -> None:
    config = config_of(kind, downsample)
    with torch.device("meta"):
        model = FactorizedTokenizer(config, with_feature_heads=with_heads)
    published = to_published_state_dict(model.state_dict(), config)
    expected = recorded_shapes(f"sd_{kind}_VQ-{downsample}_{'clip' if with_heads else 'noclip'}")
    assert {key: tuple(value.shape) for key, value in published.items()} == expected


@pytest.mark.parametrize("with_heads", [True, False], ids=["heads", "no_heads"])
@pytest.mark.parametrize(("kind", "downsample"), VARIANTS)
def test_parameter_counts(kind: str, downsample: int, with_heads: bool) -> None:
    with torch.device("meta"):
        model = FactorizedTokenizer(config_of(kind, downsample), with_feature_heads=with_heads)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETER_COUNTS[kind, downsample][0 if with_heads else 1]


def test_discriminator_names_and_shapes() -> None:
    with torch.device("meta"):
        discriminator = PatchDiscriminator(DiscriminatorConfig())
    shapes = {key: tuple(value.shape) for key, value in discriminator.state_dict().items()}
    assert list(shapes.items()) == list(recorded_shapes("sd_disc").items())


@pytest.mark.parametrize(("kind", "downsample"), VARIANTS)
def test_epsilons_of_the_norms(kind: str, downsample: int) -> None:
    # The recorded numbers do not tell 1e-6 from 1e-5.
    with torch.device("meta"):
        model = FactorizedTokenizer(config_of(kind, downsample))
    found = {
        (norm, module.eps)
        for module in model.modules()
        for norm in (nn.GroupNorm, nn.LayerNorm)
        if isinstance(module, norm)
    }
    assert found == {(nn.GroupNorm, 1e-6), (nn.LayerNorm, 1e-5)}


def test_maps_before_quantization(recorded: Recorded) -> None:
    for branch in recorded.branches:
        assert relative_error(recorded.maps[branch], recorded.vectors[f"pre_quant.{branch}"]) < 5e-6


def test_codes_of_the_recorded_maps(recorded: Recorded) -> None:
    for index, module in enumerate(recorded.model.branches.values()):
        latents = recorded.vectors[f"pre_quant.{recorded.branches[index]}"]
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, 8)
        codebook = module.quantizer.codebook.detach()
        found = nearest_codes(vectors, codebook)
        cosines = F.normalize(vectors.double(), dim=1) @ F.normalize(codebook.double(), dim=1).T
        best = cosines.topk(2, dim=1).values
        is_clear = best[:, 0] - best[:, 1] > 1e-6
        assert is_clear.float().mean() > 0.99
        assert torch.equal(found[is_clear], recorded.codes[:, index].flatten()[is_clear])


def test_reconstruction(recorded: Recorded) -> None:
    reconstruction = recorded.output.reconstruction[:1]
    assert relative_error(reconstruction, recorded.vectors["reconstruction"]) < 3e-5


def test_class_tokens(recorded: Recorded) -> None:
    assert recorded.output.class_tokens.keys() == HEADS[recorded.kind].keys()
    for teacher, head in HEADS[recorded.kind].items():
        found = recorded.output.class_tokens[teacher]
        assert relative_error(found, recorded.vectors[f"{head}.class_token"]) < 5e-6


def test_reconstruction_from_single_codebooks(recorded: Recorded) -> None:
    for index, branch in enumerate(recorded.branches):
        with torch.no_grad():
            image = recorded.model.decode_codes(recorded.codes[:1], keep=[index])
        expected = recorded.vectors[f"reconstruction_only.{branch}.corner"]
        assert relative_error(image[:, :, :32, :32], expected) < 3e-5


@with_variants(VARIANTS[:2])
def test_losses(recorded: Recorded, losses: dict[str, Tensor]) -> None:
    expected = {
        name.removeprefix("loss."): value
        for name, value in recorded.vectors.items()
        if name.startswith("loss.") and "hinge" not in name
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(losses[name], value) < 2e-6, name


@with_variants(VARIANTS[:2])
@pytest.mark.parametrize(("what", "tolerance"), [("norm", 1e-5), ("head", 1e-4), ("rows", 1e-4)])
def test_gradients(
    recorded: Recorded, losses: dict[str, Tensor], what: str, tolerance: float
) -> None:
    names = {
        map_to_published_key(name, recorded.model.config): parameter
        for name, parameter in recorded.model.named_parameters()
    }
    prefix = f"grad_{what}."
    expected = {
        name.removeprefix(prefix): value
        for name, value in recorded.vectors.items()
        if name.startswith(prefix)
    }
    assert expected
    for name, value in expected.items():
        gradient = names[name].grad
        assert gradient is not None
        if what == "norm":
            found = gradient.norm()
        elif what == "head":
            found = gradient.flatten()[:16]
        else:
            branch = name.removeprefix("quantize_").removesuffix(".embedding.weight")
            found = gradient[recorded.vectors[f"codes.{branch}"].flatten()[:2].long()]
        assert relative_error(found, value) < tolerance, name


@with_variants(VARIANTS[:1])
def test_discriminator(recorded: Recorded) -> None:
    discriminator = PatchDiscriminator(DiscriminatorConfig())
    state = discriminator.state_dict()
    weights = {
        key: recorded_weight(f"discriminator.{key}", tuple(value.shape))
        for key, value in state.items()
        if "running_" not in key and "num_batches" not in key
    }
    discriminator.load_state_dict({**state, **weights})
    with torch.no_grad():
        real = discriminator(recorded.images)
        fake = discriminator(recorded.output.reconstruction)
    expected = recorded.vectors
    assert relative_error(real, expected["discriminator.real"]) < 3e-5
    assert relative_error(fake, expected["discriminator.fake"]) < 3e-5
    assert relative_error(hinge_discriminator_loss(real, fake), expected["loss.hinge_d"]) < 2e-6
    assert relative_error(hinge_generator_loss(fake), expected["loss.hinge_g"]) < 2e-6
