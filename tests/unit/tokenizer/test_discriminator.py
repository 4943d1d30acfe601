from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fqgan_dist.tokenizer.config import DiscriminatorConfig
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator, RecordingBatchNorm

SMALL = DiscriminatorConfig(base_channels=4, num_layers=2)


def build_discriminator() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(SMALL)


def with_ordinary_batch_norm(discriminator: PatchDiscriminator) -> PatchDiscriminator:
    ordinary = copy.deepcopy(discriminator)
    for index, layer in enumerate(ordinary.main):
        if isinstance(layer, RecordingBatchNorm):
            norm = nn.BatchNorm2d(layer.num_features)
            norm.load_state_dict(layer.state_dict())
            ordinary.main[index] = norm
    return ordinary


def test_logits_are_a_grid_of_patches() -> None:
    with torch.device("meta"):
        logits = PatchDiscriminator(DiscriminatorConfig())(torch.empty(2, 3, 256, 256))
    assert logits.shape == (2, 1, 30, 30)


def test_train_mode_leaves_the_running_statistics() -> None:
    discriminator = build_discriminator()
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    discriminator(torch.randn(2, 3, 32, 32))
    after = discriminator.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_folding_equals_ordinary_batch_norm_over_several_passes() -> None:
    ours = build_discriminator()
    ordinary = with_ordinary_batch_norm(ours)
    batches = [torch.randn(2, 3, 32, 32) * scale for scale in (1, 2, 3)]
    for batch in batches:
        assert torch.equal(ours(batch), ordinary(batch))
    ours.fold_batch_statistics(ours.take_batch_statistics())
    for key, value in ordinary.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    assert torch.allclose(ours.eval()(batches[0]), ordinary.eval()(batches[0]))


def test_gradients_equal_ordinary_batch_norm() -> None:
    ours = build_discriminator()
    ordinary = with_ordinary_batch_norm(ours)
    images = torch.randn(2, 3, 32, 32)
    ours(images).square().mean().backward()
    ordinary(images).square().mean().backward()
    for found, expected in zip(ours.parameters(), ordinary.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_taking_empties_the_record_and_keeps_the_order() -> None:
    discriminator = build_discriminator()
    for level in (0.0, 1.0):
        discriminator(torch.full((2, 3, 32, 32), level))
    taken = discriminator.take_batch_statistics()
    assert len(taken) == 2
    assert discriminator.take_batch_statistics() == []
    discriminator(torch.full((2, 3, 32, 32), 1.0))
    assert torch.equal(discriminator.take_batch_statistics()[0], taken[1])
    assert not torch.equal(taken[0], taken[1])


def test_eval_mode_records_nothing() -> None:
    discriminator = build_discriminator().eval()
    discriminator(torch.randn(2, 3, 32, 32))
    assert discriminator.take_batch_statistics() == []


def test_statistics_of_another_architecture_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(48,\)"):
        build_discriminator().fold_batch_statistics([torch.zeros(3)])


def test_initial_weights() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig())
    convolutions = [layer for layer in discriminator.main if isinstance(layer, nn.Conv2d)]
    for layer in convolutions[1:4]:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert convolutions[-1].bias.item() == 0
    assert sum(each.numel() for each in discriminator.parameters()) == 2_765_633
