from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fqgan_dist.autoregressive.losses import compute_code_losses


def compute_slowly(logits: Tensor, codes: Tensor) -> Tensor:
    losses = []
    for codebook in range(codes.shape[1]):
        rows = logits[:, codebook].flatten(0, 1)
        losses.append(functional.cross_entropy(rows, codes[:, codebook].flatten()))
    return torch.stack(losses)


def draw(codebook_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    codes = torch.randint(codebook_size, (5, 3, 2, 2))
    logits = 3 * torch.randn(5, 3, 4, codebook_size)
    return logits.to(dtype).requires_grad_(), codes


# The larger codebook takes two blocks of rows, the second one short.
@pytest.mark.parametrize("codebook_size", [7, 2**17])
def test_losses_and_gradients_are_those_of_cross_entropy(codebook_size: int):
    logits, codes = draw(codebook_size, torch.float64)
    weights = torch.tensor([1.0, 0.0, -2.5], dtype=torch.float64)
    actual, expected = compute_code_losses(logits, codes), compute_slowly(logits, codes)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), logits)[0],
        torch.autograd.grad((expected * weights).sum(), logits)[0],
    )


def test_logits_need_not_be_contiguous():
    logits, codes = draw(7, torch.float64)
    transposed = logits.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    compute_code_losses(transposed, codes).sum().backward()
    compute_code_losses(logits, codes).sum().backward()
    assert transposed.grad is not None
    torch.testing.assert_close(transposed.grad, logits.grad)


def test_bfloat16_logits_give_a_float32_loss_and_a_bfloat16_gradient():
    logits, codes = draw(50, torch.bfloat16)
    losses = compute_code_losses(logits, codes)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, compute_slowly(logits.float(), codes))
    losses.mean().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    exact = logits.detach().float().requires_grad_()
    compute_slowly(exact, codes).mean().backward()
    assert exact.grad is not None
    assert logits.grad.equal(exact.grad.bfloat16())


def test_no_second_copy_of_the_logits_is_kept_for_backward():
    logits, codes = draw(50, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_code_losses(logits, codes)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_extreme_logits_stay_finite():
    logits = torch.full((1, 1, 1, 3), -1e4, requires_grad=True)
    losses = compute_code_losses(logits, torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    assert losses.item() == pytest.approx(torch.tensor(3.0).log().item())


def test_shapes_that_do_not_belong_together_are_refused():
    logits, codes = draw(7, torch.float32)
    with pytest.raises(ValueError, match="do not belong to codes of shape"):
        compute_code_losses(logits[:, :2], codes)
