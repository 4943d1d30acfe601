"""The patch discriminator, whose BatchNorm statistics are folded explicitly, once a step.

Letters: B images, C channels, H W pixels.
Source: pix2pix's PatchGAN as in VQGAN and FQGAN (reference/fqgan.md, section 1.9).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fqgan_dist.loss_group import ALONE, LossGroup
from fqgan_dist.tokenizer.config import DiscriminatorConfig
from fqgan_dist.tokenizer.synchronized_batch_norm import synchronized_batch_norm

BATCH_NORM_MOMENTUM = 0.1
"""Share of each forward pass's statistics in the running ones."""


class RecordingBatchNorm(nn.BatchNorm2d):
    """BatchNorm that in train mode records its batch statistics instead of moving the running ones.

    The running statistics are state across micro-batches: moved inside the forward pass they would
    depend on which micro-batches a rank happens to run. The forward pass gives the same numbers as
    nn.BatchNorm2d of the whole micro-batch, over all ranks that share it.
    """

    # torch allows BatchNorm without running statistics; this one always has them.
    running_mean: Tensor  # pyright: ignore[reportIncompatibleVariableOverride] see above
    running_var: Tensor  # pyright: ignore[reportIncompatibleVariableOverride] see above
    num_batches_tracked: Tensor  # pyright: ignore[reportIncompatibleVariableOverride] see above

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=BATCH_NORM_MOMENTUM)
        self.recorded: list[Tensor] = []
        """Per train-mode forward pass the batch mean and unbiased variance, (2 C,) float32."""

    def forward(self, input: Tensor, loss_group: LossGroup = ALONE) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if not self.training:
            return super().forward(input)
        if loss_group.size > 1:
            output, mean, variance = synchronized_batch_norm(
                input, self.weight, self.bias, eps=self.eps, loss_group=loss_group
            )
            self.recorded.append(torch.cat([mean, variance]))
            return output
        # With momentum 1 torch writes exactly the batch's statistics into the buffers given.
        mean = torch.zeros_like(self.running_mean)
        variance = torch.zeros_like(self.running_var)
        output = F.batch_norm(
            input, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )
        self.recorded.append(torch.cat([mean, variance]))
        return output

    @torch.no_grad()
    def fold(self, statistics: Tensor) -> None:
        """Move the running statistics by one recorded forward pass, (2 C,)."""
        mean, variance = statistics.chunk(2)
        self.running_mean.lerp_(mean, BATCH_NORM_MOMENTUM)
        self.running_var.lerp_(variance, BATCH_NORM_MOMENTUM)
        self.num_batches_tracked.add_(1)


class PatchDiscriminator(nn.Module):
    """Judge overlapping patches of an image; higher logits are more real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        """Draw random weights: convolutions N(0, 0.02), BatchNorm scales N(1, 0.02), biases 0."""
        super().__init__()
        channels = config.base_channels
        layers: list[nn.Module] = [_convolution(3, channels, stride=2), nn.LeakyReLU(0.2)]
        for layer in range(1, config.num_layers + 1):
            wider = config.base_channels * min(2**layer, 8)
            stride = 1 if layer == config.num_layers else 2
            layers += [
                _convolution(channels, wider, stride=stride, bias=False),
                RecordingBatchNorm(wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        layers.append(_convolution(channels, 1, stride=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor, loss_group: LossGroup = ALONE) -> Tensor:
        """Judge images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            loss_group: the ranks whose images share BatchNorm's statistics in train mode.

        Returns:
            Logits (B, 1, H', W'): 30 x 30 for 256 pixels.
        """
        # A loop, as nn.Sequential cannot hand the loss group on.
        for layer in self.main:
            is_norm = isinstance(layer, RecordingBatchNorm)
            images = layer(images, loss_group) if is_norm else layer(images)
        return images

    def take_batch_statistics(self) -> list[Tensor]:
        """Take out what the train-mode forward passes recorded since the last call, oldest first.

        Returns:
            One flat float32 tensor per forward pass: mean and unbiased variance of each BatchNorm
            in turn, the same on all members of a loss group. They stay in memory until taken.
        """
        norms = self._batch_norms()
        taken = [torch.cat(parts) for parts in zip(*(norm.recorded for norm in norms), strict=True)]
        for norm in norms:
            norm.recorded = []
        return taken

    def fold_batch_statistics(
        self, statistics: Sequence[Tensor], *, refused: Tensor | None = None
    ) -> None:
        """Move the running statistics by these forward passes, in this order, with momentum 0.1.

        Args:
            statistics: tensors of `take_batch_statistics`, of all ranks in micro-batch order.
            refused: bool (), whether their step was refused: they move nothing then. The device
                decides: nobody waits for it.

        Raises:
            ValueError: a tensor is not of this discriminator.
        """
        norms = self._batch_norms()
        sizes = [2 * norm.num_features for norm in norms]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers] if refused is not None else []
        for each in statistics:
            if each.shape != (sum(sizes),):
                raise ValueError(
                    f"batch statistics of shape {tuple(each.shape)}: expected ({sum(sizes)},), as "
                    "take_batch_statistics of the same architecture gives"
                )
            for norm, part in zip(norms, each.split(sizes), strict=True):
                norm.fold(part)
        if refused is not None:
            for buffer, former in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(refused, former, buffer))

    def _batch_norms(self) -> list[RecordingBatchNorm]:
        return [layer for layer in self.main if isinstance(layer, RecordingBatchNorm)]


def _convolution(
    in_channels: int, out_channels: int, *, stride: int, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)


def _initialize(module: nn.Module) -> None:
    match module:
        case nn.Conv2d():
            nn.init.normal_(module.weight, 0.0, 0.02)
        case nn.BatchNorm2d():
            nn.init.normal_(module.weight, 1.0, 0.02)
        case _:
            return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
