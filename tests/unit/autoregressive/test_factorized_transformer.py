from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.autoregressive.transformer import FactorizedTransformer

BuildModel = Callable[..., FactorizedTransformer]


def draw_codes(model: FactorizedTransformer, batch_size: int = 2) -> Tensor:
    config = model.config
    shape = (batch_size, config.num_codebooks, config.grid_size, config.grid_size)
    return torch.randint(
        config.codebook_size, shape, generator=torch.Generator().manual_seed(batch_size)
    )


@torch.no_grad()
def test_a_code_changes_only_the_logits_after_it(build_model: BuildModel, kind: str):
    model = build_model(kind)
    num_codebooks, num_positions = 3, 9
    codes, labels = draw_codes(model, 1), torch.tensor([2])
    before = model(codes, labels)
    for position in range(num_positions):
        for codebook in range(num_codebooks):
            changed = codes.clone()
            changed.view(1, num_codebooks, num_positions)[0, codebook, position] += 1
            changed %= model.config.codebook_size
            is_changed = (model(changed, labels) != before).any(-1)[0]
            may_change = torch.zeros(num_codebooks, num_positions, dtype=torch.bool)
            may_change[:, position + 1 :] = True
            if kind == "autoregressive":
                may_change[codebook + 1 :, position] = True
            # Equality, not closeness: what may not depend must not differ in a single bit, and
            # what may depend does with these weights.
            assert is_changed.equal(may_change), (position, codebook)


@torch.no_grad()
def test_the_label_changes_all_logits(build_model: BuildModel, kind: str):
    model = build_model(kind)
    codes = draw_codes(model, 1)
    logits = [model(codes, torch.tensor([label])) for label in (0, 5)]
    assert (logits[0] != logits[1]).any(-1).all()


def test_every_parameter_gets_a_gradient(build_model: BuildModel, kind: str):
    model = build_model(kind).train()
    codes = draw_codes(model, 4)
    compute_code_losses(model(codes, torch.arange(4)), codes).mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_dropouts_are_drawn_from_the_default_generator(build_model: BuildModel):
    model = build_model().train()
    codes, labels = draw_codes(model), torch.tensor([1, 2])
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        logits.append(model(codes, labels))
    assert logits[0].equal(logits[1])
    assert not logits[0].equal(logits[2])


def test_evaluation_has_no_randomness(build_model: BuildModel):
    model = build_model()
    codes, labels = draw_codes(model), torch.tensor([1, 2])
    assert model(codes, labels).equal(model(codes, labels))


def test_class_dropout_replaces_labels_by_the_null_class(build_model: BuildModel):
    no_dropout = {"token_dropout": 0, "residual_dropout": 0, "ffn_dropout": 0}
    model = build_model(class_dropout=0.25, **no_dropout).train()
    codes = draw_codes(model, 1).repeat(400, 1, 1, 1)
    with torch.no_grad():
        torch.manual_seed(0)
        first_logits = model(codes, torch.full((400,), 3))[:, 0, 0]
        model.eval()
        of_class, of_null = model(codes[:2], torch.tensor([3, 5]))[:, 0, 0]
    is_null = (first_logits - of_null).abs().max(-1).values < 1e-9
    is_class = (first_logits - of_class).abs().max(-1).values < 1e-9
    assert (is_null ^ is_class).all()
    # 100 expected, standard deviation 8.7.
    assert 65 < is_null.sum().item() < 135


@pytest.mark.parametrize("rate", ["token_dropout", "residual_dropout", "ffn_dropout"])
def test_every_dropout_has_an_effect_in_training(build_model: BuildModel, rate: str):
    rates = {"token_dropout": 0, "residual_dropout": 0, "ffn_dropout": 0, "class_dropout": 0}
    model = build_model(**(rates | {rate: 0.5}))
    codes, labels = draw_codes(model), torch.tensor([1, 2])
    assert not model.train()(codes, labels).equal(model.eval()(codes, labels))


def test_without_dropout_training_equals_evaluation(build_model: BuildModel):
    rates = {"token_dropout": 0, "residual_dropout": 0, "ffn_dropout": 0, "class_dropout": 0}
    model = build_model(**rates)
    codes, labels = draw_codes(model), torch.tensor([1, 2])
    assert model.train()(codes, labels).equal(model.eval()(codes, labels))


@torch.no_grad()
def test_autocast_gives_bfloat16_logits_near_the_float32_ones(build_model: BuildModel, kind: str):
    model = build_model(kind).float()
    codes, labels = draw_codes(model), torch.tensor([1, 2])
    expected = model(codes, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(codes, labels)
    assert logits.dtype == torch.bfloat16
    # Eight bits of mantissa through two to four layers.
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_meta_model_becomes_a_fresh_one(build_model: BuildModel):
    settings = build_model().config
    with torch.device("meta"):
        model = FactorizedTransformer(settings)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    fresh = FactorizedTransformer(settings)
    torch.manual_seed(3)
    fresh.reset_parameters()
    assert all(a.equal(b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    codes, labels = draw_codes(model), torch.tensor([1, 2])
    assert model.eval()(codes, labels).equal(fresh.eval()(codes, labels))


def test_initial_scale_is_the_published_one(build_model: BuildModel):
    model = FactorizedTransformer(build_model(codebook_size=4000).config)
    assert model.get_parameter("code_embeddings.0.weight").std().item() == pytest.approx(
        0.02, rel=0.05
    )
    assert not model.aggregation.bias.any()
    assert not any(parameter.any() for parameter in model.classifiers.parameters())


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (2, 3, 3, 4), (2, 3, 9)])
def test_codes_of_another_shape_are_refused(build_model: BuildModel, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"codes of shape .* expected .* \(B, 3, 3, 3\)"):
        build_model()(torch.zeros(shape, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


def test_labels_of_another_batch_are_refused(build_model: BuildModel):
    model = build_model()
    with pytest.raises(
        ValueError, match=r"labels of shape \(3,\) - expected one per image, \(2,\)"
    ):
        model(draw_codes(model), torch.zeros(3, dtype=torch.int64))
