"""BatchNorm over the images of several ranks: the statistics, and their gradient, are shared.

Letters: B images of this rank, C channels, H W pixels.
Source: Batch Normalization, arXiv 1502.03167, equations of section 3, over the group's images.
torch.nn.SyncBatchNorm does the same, but on GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fqgan_dist.loss_group import LossGroup

_REDUCED = (0, 2, 3)


def synchronized_batch_norm(
    features: Tensor, weight: Tensor, bias: Tensor, *, eps: float, loss_group: LossGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the statistics of all members' features.

    In the backward pass a member's gradient includes what its features do to the others' outputs;
    the gradients of weight and bias are this member's share, to be summed over ranks.

    Args:
        features: (B, C, H, W) float, as many on every member.
        weight: scale, (C,).
        bias: shift, (C,).
        eps: added to the variance.
        loss_group: the members; all must call it, and run the backward pass, in the same order.

    Returns:
        The output, (B, C, H, W), and without gradient the mean and the unbiased variance, (C,) in
        at least float32, the same bits on every member.
    """
    return _SynchronizedBatchNorm.apply(features, weight, bias, eps, loss_group)


class _SynchronizedBatchNorm(torch.autograd.Function):
    """Keeps for its backward pass what the fused kernels keep: the input and two numbers per C."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        loss_group: LossGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        precise = _precise(features)
        own = torch.stack(torch.var_mean(precise, dim=_REDUCED, correction=0))
        variances, means = loss_group.gather(own).unbind(1)
        mean = means.mean(dim=0)
        # Members have equal counts: the variance is the mean of theirs, and that of their means.
        variance = variances.mean(dim=0) + (means - mean).square().mean(dim=0)
        # Evaluation mode is the fused kernel that takes the statistics as they are given.
        output = F.batch_norm(features, mean, variance, weight, bias, training=False, eps=eps)
        count = loss_group.size * features.numel() // features.shape[1]
        unbiased = variance * (count / (count - 1))
        ctx.save_for_backward(features, weight, mean, torch.rsqrt(variance + eps))
        ctx.loss_group = loss_group
        ctx.mark_non_differentiable(mean, unbiased)
        return output, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] torch: (ctx, *grads)
        ctx: Any, grad_output: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        features, weight, mean, inverse_deviation = ctx.saved_tensors
        gradient = _precise(grad_output)
        centred = _precise(features) - _spread(mean)
        normalized = centred.mul_(_spread(inverse_deviation))
        grad_bias = gradient.sum(dim=_REDUCED)
        grad_weight = (gradient * normalized).sum(dim=_REDUCED)
        # The statistics' gradients: means over all members' values.
        count = features.numel() // features.shape[1]
        sums = ctx.loss_group.mean(torch.stack([grad_bias, grad_weight])) / count
        by_mean, by_variance = (_spread(each) for each in sums)
        grad_features = gradient - by_mean - normalized.mul_(by_variance)
        grad_features.mul_(_spread(_precise(weight) * inverse_deviation))
        return (
            grad_features.to(features.dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(weight.dtype),
            None,
            None,
        )


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _spread(values: Tensor) -> Tensor:
    return values[:, None, None]
