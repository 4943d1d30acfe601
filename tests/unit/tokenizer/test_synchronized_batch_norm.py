"""Members that share statistics against one rank that has all images."""

from __future__ import annotations

import pytest
import torch
from support.thread_members import ThreadMember, run_members
from torch import Tensor, nn
from torch.nn import functional

from fqgan_dist.loss_group import ALONE
from fqgan_dist.tokenizer.config import DiscriminatorConfig
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.synchronized_batch_norm import synchronized_batch_norm

EPS = 1e-5


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype) * 3 + 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_whole_batch(size: int) -> None:
    images, upstream = draw(6, 4, 3, 5), draw(6, 4, 3, 5)
    weight, bias = draw(4), draw(4)
    expected = nn.BatchNorm2d(4, eps=EPS, momentum=1.0, dtype=torch.float64)
    expected.load_state_dict(expected.state_dict() | {"weight": weight, "bias": bias})
    whole = images.clone().requires_grad_()
    output = expected(whole)
    (output * upstream).sum().backward()

    def run(member: ThreadMember) -> list[Tensor]:
        rows = member.rows(len(images) // size)
        own = [each.clone().requires_grad_() for each in (images[rows], weight, bias)]
        result, mean, variance = synchronized_batch_norm(*own, eps=EPS, loss_group=member)
        (result * upstream[rows]).sum().backward()
        gradients = [each.grad for each in own]
        assert all(gradient is not None for gradient in gradients)
        return [result.detach(), mean, variance, *(g for g in gradients if g is not None)]

    results = list(zip(*run_members(run, size), strict=True))
    outputs, means, variances, for_images, for_weights, for_biases = results
    torch.testing.assert_close(torch.cat(outputs), output.detach())
    torch.testing.assert_close(torch.cat(for_images), whole.grad)
    # Parameters' gradients are shares: engines sum over ranks.
    torch.testing.assert_close(torch.stack(for_weights).sum(dim=0), expected.weight.grad)
    torch.testing.assert_close(torch.stack(for_biases).sum(dim=0), expected.bias.grad)
    for mean, variance in zip(means, variances, strict=True):
        assert torch.equal(mean, means[0])
        torch.testing.assert_close(mean, expected.running_mean)
        torch.testing.assert_close(variance, expected.running_var)


def test_its_gradient_is_that_of_its_values() -> None:
    inputs = [draw(3, 2, 2, 2).requires_grad_(), draw(2).requires_grad_(), draw(2).requires_grad_()]

    def normalize(*values: Tensor) -> Tensor:
        return synchronized_batch_norm(*values, eps=EPS, loss_group=ALONE)[0]

    assert torch.autograd.gradcheck(normalize, inputs)


def test_bf16_features_have_fp32_statistics() -> None:
    images = draw(8, 4, 6, 6, dtype=torch.float32).bfloat16()
    weight, bias = torch.ones(4), torch.zeros(4)
    output, mean, _ = synchronized_batch_norm(images, weight, bias, eps=EPS, loss_group=ALONE)
    assert (output.dtype, mean.dtype) == (torch.bfloat16, torch.float32)
    precise = functional.batch_norm(
        images.float(), None, None, weight, bias, training=True, eps=EPS
    )
    torch.testing.assert_close(output.float(), precise, rtol=1e-2, atol=1e-2)


def test_the_discriminator_s_members_record_the_same_statistics() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=2))
    states = discriminator.state_dict()
    images = draw(4, 3, 32, 32, dtype=torch.float32)
    logits = discriminator(images)
    [expected] = discriminator.take_batch_statistics()

    def run(member: ThreadMember) -> tuple[Tensor, Tensor]:
        own = PatchDiscriminator(DiscriminatorConfig(base_channels=4, num_layers=2))
        own.load_state_dict(states)
        found = own(images[member.rows(2)], member)
        [statistics] = own.take_batch_statistics()
        return found.detach(), statistics

    outputs, statistics = zip(*run_members(run, 2), strict=True)
    assert torch.equal(statistics[0], statistics[1])
    torch.testing.assert_close(statistics[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(outputs), logits.detach(), rtol=1e-4, atol=1e-5)
