"""The mean of the members' losses is the micro-batch's, and so are the summed gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.thread_members import ThreadMember, run_members
from torch import Tensor
from torch.nn import functional

from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.tokenizer.entropy import entropy_loss
from fqgan_dist.tokenizer.losses import info_nce_loss

SIZES = [2, 3]
Loss = Callable[[Tensor, Tensor, LossGroup], Tensor]


def draw_units(count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def losses_and_gradients(
    loss_fn: Loss, inputs: Tensor, shared: Tensor, size: int, *, is_cut: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss, the gradients of all inputs, and the shared tensor's summed gradient.

    Args:
        loss_fn: maps a member's rows, the shared tensor and the group to a loss.
        inputs: rows of the whole micro-batch.
        shared: what every member has, or what is cut like the rows.
        size: number of members.
        is_cut: whether `shared` is cut too.
    """

    def run(member: ThreadMember) -> tuple[Tensor, Tensor, Tensor]:
        rows = member.rows(len(inputs) // size)
        own = inputs[rows].clone().requires_grad_()
        other = (shared[rows] if is_cut else shared).clone().requires_grad_()
        loss = loss_fn(own, other, member)
        (loss / size).backward()
        assert own.grad is not None
        grad = torch.zeros_like(other) if other.grad is None else other.grad
        return loss.detach(), own.grad, grad

    losses, gradients, others = zip(*run_members(run, size), strict=True)
    return torch.stack(losses).mean(), torch.cat(gradients), torch.stack(others).sum(dim=0)


@pytest.mark.parametrize("size", SIZES)
def test_entropy_is_averaged_over_all_vectors(size: int) -> None:
    vectors, codebook = draw_units(24, 4), draw_units(10, 4)
    whole, codes = vectors.clone().requires_grad_(), codebook.clone().requires_grad_()
    expected = entropy_loss(whole, codes, ALONE)
    expected.backward()
    loss, gradient, for_codes = losses_and_gradients(
        entropy_loss, vectors, codebook, size, is_cut=False
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(for_codes, codes.grad, rtol=1e-4, atol=1e-6)


def test_the_entropy_of_parts_alone_is_another() -> None:
    vectors, codebook = draw_units(24, 4), draw_units(10, 4)
    parts = [entropy_loss(part, codebook) for part in vectors.chunk(2)]
    assert abs(torch.stack(parts).mean() - entropy_loss(vectors, codebook)) > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_features_are_contrasted_with_those_of_all_members(size: int) -> None:
    predicted, target = draw_units(6, 8), draw_units(6, 8).flip(1)
    whole = predicted.clone().requires_grad_()
    expected = info_nce_loss(whole, target)
    expected.backward()
    loss, gradient, for_targets = losses_and_gradients(
        info_nce_loss, predicted, target, size, is_cut=True
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-5, atol=1e-7)
    assert not for_targets.any()
