from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fqgan_dist.tokenizer.losses import (
    disentanglement_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    info_nce_loss,
)


def test_orthogonal_maps_are_disentangled() -> None:
    first = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    second = torch.tensor([0.0, 5.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert disentanglement_loss([first, second]).item() == 0


def test_antiparallel_maps_are_entangled() -> None:
    first = torch.randn(2, 4, 3, 3)
    assert disentanglement_loss([first, -2 * first]).item() == pytest.approx(1)


def test_disentanglement_averages_over_pairs() -> None:
    maps = [torch.randn(2, 4, 3, 3) for _ in range(3)]
    pairs = [disentanglement_loss([maps[a], maps[b]]) for a, b in [(0, 1), (0, 2), (1, 2)]]
    assert disentanglement_loss(maps).item() == pytest.approx(sum(pairs).item() / 3)


def test_disentanglement_of_one_codebook_is_zero() -> None:
    assert torch.equal(disentanglement_loss([torch.randn(2, 4, 3, 3)]), torch.zeros(()))


def test_disentanglement_refuses_maps_of_other_shapes() -> None:
    with pytest.raises(ValueError, match="expected one or more, all alike"):
        disentanglement_loss([torch.zeros(1, 4, 3, 3), torch.zeros(1, 8, 3, 3)])


def test_info_nce_is_the_plain_formula() -> None:
    predicted, target = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    scores = (F.normalize(predicted, dim=1) @ F.normalize(target, dim=1).T).exp()
    expected = -(scores.diagonal() / scores.sum(dim=1)).log().mean()
    assert info_nce_loss(predicted, target).item() == pytest.approx(expected.item(), rel=1e-6)


def test_info_nce_at_chance_is_log_of_the_batch() -> None:
    same = torch.ones(32, 16)
    assert info_nce_loss(same, same).item() == pytest.approx(math.log(32))


def test_info_nce_sends_no_gradient_to_the_teacher() -> None:
    predicted = torch.randn(4, 3, requires_grad=True)
    target = torch.randn(4, 3, requires_grad=True)
    info_nce_loss(predicted, target).backward()
    assert predicted.grad is not None
    assert target.grad is None


def test_info_nce_is_fp32_under_autocast() -> None:
    predicted, target = torch.randn(6, 64), torch.randn(6, 64)
    expected = info_nce_loss(predicted, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce_loss(predicted, target), expected)


def test_info_nce_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected the same \(B, E\)"):
        info_nce_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    assert hinge_generator_loss(fake).item() == pytest.approx(1.0)


def test_hinge_losses_of_bfloat16_logits_are_float32() -> None:
    logits = torch.randn(1000).bfloat16()
    assert hinge_generator_loss(logits).dtype == torch.float32
    assert hinge_discriminator_loss(logits, logits).dtype == torch.float32
