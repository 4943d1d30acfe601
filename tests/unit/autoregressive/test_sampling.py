from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from fqgan_dist.autoregressive.config import SamplingConfig
from fqgan_dist.autoregressive.sampling import draw_uniforms, generate_codes
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.config import parse_config
from fqgan_dist.errors import ConfigError, NumericsError

BuildModel = Callable[..., FactorizedTransformer]

SETTINGS = [
    SamplingConfig(),
    SamplingConfig(guidance_scale=2.0, temperature=0.8),
    SamplingConfig(guidance_scale=1.5, top_k=6, top_p=0.9),
    SamplingConfig(guidance_scale=3.0, top_k=1),
]


def draw(model: FactorizedTransformer, sample_ids: list[int], seed: int = 0) -> torch.Tensor:
    return draw_uniforms(
        sample_ids,
        seed=seed,
        num_positions=model.config.num_positions,
        num_codebooks=model.config.num_codebooks,
    )


def generate(
    model: FactorizedTransformer, sample_ids: list[int], config: SamplingConfig, seed: int = 0
) -> torch.Tensor:
    labels = torch.tensor([sample_id % 6 for sample_id in sample_ids])
    return generate_codes(model, labels, draw(model, sample_ids, seed), config)


def select_slowly(logits: torch.Tensor, uniform: torch.Tensor, config: SamplingConfig) -> int:
    probabilities = logits.softmax(-1).tolist()
    order = sorted(range(11), key=lambda code: -probabilities[code])[: config.top_k or None]
    top_k_mass = sum(probabilities[code] for code in order)
    allowed: dict[int, float] = {}
    for code in order:
        allowed[code] = probabilities[code]
        if sum(allowed.values()) > config.top_p * top_k_mass:
            break
    thresholds = itertools.accumulate(allowed[code] for code in sorted(allowed))
    drawn_mass = uniform.item() * sum(allowed.values())
    return next(c for c, mass in zip(sorted(allowed), thresholds, strict=True) if mass > drawn_mass)


def generate_slowly(
    model: FactorizedTransformer, sample_id: int, config: SamplingConfig
) -> torch.Tensor:
    """One sample by a whole teacher-forced pass per code, guidance on the logits."""
    uniforms = draw(model, [sample_id])[0]
    codes = torch.zeros(1, 3, 3, 3, dtype=torch.int64)
    for position in range(9):
        for codebook in range(3):
            with torch.no_grad():
                pair = model(codes.repeat(2, 1, 1, 1), torch.tensor([sample_id % 6, 5]))
            conditional, null = pair[:, codebook, position]
            logits = null + config.guidance_scale * (conditional - null)
            code = select_slowly(logits / config.temperature, uniforms[position, codebook], config)
            codes.view(1, 3, 9)[0, codebook, position] = code
    return codes[0]


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_generation_is_the_slow_definition(
    build_model: BuildModel, kind: str, config: SamplingConfig
):
    model = build_model(kind)
    generated = generate(model, [3, 8, 11], config)
    for codes, sample_id in zip(generated, [3, 8, 11], strict=True):
        assert codes.equal(generate_slowly(model, sample_id, config))


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_sample_depends_only_on_seed_and_id(
    build_model: BuildModel, kind: str, config: SamplingConfig
):
    model = build_model(kind)
    together = dict(zip(range(7), generate(model, list(range(7)), config), strict=True))
    apart = {}
    for group in ([4], [6, 0, 2], [1, 5], [3]):
        apart |= dict(zip(group, generate(model, group, config), strict=True))
    assert all(apart[sample_id].equal(together[sample_id]) for sample_id in range(7))


def test_another_seed_gives_other_samples(build_model: BuildModel):
    model = build_model()
    first = generate(model, [0, 1], SamplingConfig(), seed=0)
    assert not first.equal(generate(model, [0, 1], SamplingConfig(), seed=1))


def test_uniforms_are_keyed_by_seed_and_id():
    settings = {"num_positions": 4, "num_codebooks": 2}
    together = draw_uniforms([5, 6], seed=3, **settings)
    assert together.shape == (2, 4, 2)
    assert together.dtype == torch.float64
    assert ((together >= 0) & (together < 1)).all()
    assert together[1:].equal(draw_uniforms([6], seed=3, **settings))
    assert not together[1:].equal(draw_uniforms([6], seed=4, **settings))
    assert not together[0].equal(together[1])
    assert draw_uniforms([], seed=3, **settings).shape == (0, 4, 2)


def test_guidance_scale_of_one_is_the_conditional_model(build_model: BuildModel, kind: str):
    model = build_model(kind)
    plain = generate(model, list(range(5)), SamplingConfig(guidance_scale=1.0))
    near_one = generate(model, list(range(5)), SamplingConfig(guidance_scale=1.0 + 1e-12))
    assert plain.shape == (5, 3, 3, 3)
    assert plain.equal(near_one)


def test_guidance_scale_of_zero_ignores_the_label(build_model: BuildModel):
    model = build_model()
    uniforms = draw(model, [0]).repeat(2, 1, 1)
    config = SamplingConfig(guidance_scale=0.0)
    by_label = generate_codes(model, torch.tensor([0, 4]), uniforms, config)
    assert by_label[0].equal(by_label[1])


def test_codes_follow_the_models_distribution(build_model: BuildModel):
    model = build_model(num_codebooks=1, grid_size=1)
    num_samples, config = 20_000, SamplingConfig(temperature=2.0)
    uniforms = draw(model, list(range(num_samples)))
    labels = torch.full((num_samples,), 2)
    counts = generate_codes(model, labels, uniforms, config).flatten().bincount(minlength=11)
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, 1, 1, dtype=torch.int64), labels[:1])[0, 0, 0]
    expected = num_samples * (logits / 2.0).softmax(-1)
    chi_square = ((counts - expected).square() / expected).sum().item()
    # Ten degrees of freedom: 29.6 is exceeded with probability 0.001.
    assert chi_square < 29.6


def test_codes_are_in_the_shape_and_range_of_the_tokenizer(build_model: BuildModel, kind: str):
    codes = generate(build_model(kind), [0, 1, 2, 3], SamplingConfig())
    assert codes.shape == (4, 3, 3, 3)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 11


def test_bfloat16_weights_sample(build_model: BuildModel, kind: str):
    codes = generate(build_model(kind).bfloat16(), [0, 1], SamplingConfig(guidance_scale=2.0))
    assert 0 <= codes.min() <= codes.max() < 11


def test_progress_is_reported_once_per_position(build_model: BuildModel):
    model, done = build_model(), []
    generate_codes(
        model, torch.tensor([0]), draw(model, [0]), SamplingConfig(), on_position=done.append
    )
    assert done == list(range(1, 10))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_zero_points_to_greedy_decoding(temperature: float):
    with pytest.raises(ConfigError, match=r"temperature: .* for greedy decoding set top_k: 1"):
        parse_config({"temperature": temperature}, SamplingConfig, source="test")


@pytest.mark.parametrize("other", [{"temperature": 0.5}, {"top_p": 0.9}])
def test_settings_without_effect_on_greedy_decoding_are_refused(other: dict[str, float]):
    with pytest.raises(ConfigError, match="no effect on greedy decoding"):
        parse_config({"top_k": 1} | other, SamplingConfig, source="test")


def test_non_finite_logits_are_an_error(build_model: BuildModel):
    model = build_model()
    torch.nn.init.constant_(model.get_parameter("classifiers.2.weight"), torch.nan)
    with pytest.raises(NumericsError, match="logits are not finite"):
        generate(model, [0, 1], SamplingConfig())


def test_training_mode_is_refused_by_generation(build_model: BuildModel):
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        generate(build_model().train(), [0], SamplingConfig())


@pytest.mark.parametrize("labels", [torch.tensor([6]), torch.tensor([-1])])
def test_labels_that_are_no_class_are_refused(build_model: BuildModel, labels: torch.Tensor):
    model = build_model()
    with pytest.raises(ValueError, match="expected 0 to 4, or 5 for no class"):
        generate_codes(model, labels, draw(model, [0]), SamplingConfig())


def test_labels_of_another_type_are_refused(build_model: BuildModel):
    model = build_model()
    with pytest.raises(ValueError, match=r"expected \(B,\) int64"):
        generate_codes(model, torch.tensor([1.0]), draw(model, [0]), SamplingConfig())


def test_uniforms_of_another_batch_are_refused(build_model: BuildModel):
    model = build_model()
    with pytest.raises(ValueError, match=r"expected \(B, T, K\) = \(1, 9, 3\)"):
        generate_codes(model, torch.tensor([1]), draw(model, [0, 1]), SamplingConfig())


def test_top_k_beyond_the_codebook_is_refused(build_model: BuildModel):
    with pytest.raises(ValueError, match="top_k 12 is more than the 11 codes"):
        generate(build_model(), [0], SamplingConfig(top_k=12))
