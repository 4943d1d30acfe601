"""Exponential moving average of a model's parameters, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fqgan_dist.training.named_tensors import copy_named_tensors


class ExponentialMovingAverage:
    """Averages by parameter name; buffers are not averaged.

    It averages what an engine keeps of the parameters on a rank (`Engine.local_parameters`), whole
    or in pieces; the engine shares, loads and evaluates what is laid out like them.

    Source: LlamaGen and FQGAN average parameters only, decay 0.9999 (fqgan.md 1.10); there is no
    warm-up of the decay.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        """Start at the present parameters, also frozen ones; `decay` weighs the old average.

        Raises:
            ValueError: the decay is outside (0, 1).
        """
        if not 0 < decay < 1:
            raise ValueError(f"decay {decay!r}: expected a number between 0 and 1, such as 0.9999")
        self.decay = decay
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the average towards the parameters: a <- decay a + (1 - decay) p.

        Raises:
            ValueError: the names are others.
        """
        if parameters.keys() != self._averages.keys():
            changed = sorted(parameters.keys() ^ self._averages.keys())
            raise ValueError(
                f"the parameters differ from the averaged ones in {changed[:5]}; pass those of "
                f"the model that the average was built from"
            )
        averages = list(self._averages.values())
        values = [parameters[name].detach() for name in self._averages]
        # A few fused kernels instead of two launches per parameter; torch has no public name.
        torch._foreach_mul_(averages, self.decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, values, alpha=1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, float32; references, not copies."""
        return dict(self._averages)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore averages laid out like the parameters; raises as `copy_named_tensors`."""
        copy_named_tensors(tensors, self._averages, what="averaged weights")
