"""Exponential moving average of a model's parameters, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fqgan_dist.training.named_tensors import copy_named_tensors


class ExponentialMovingAverage:
    """Averages by parameter name; buffers are not averaged.

    Source: LlamaGen and FQGAN average parameters only, decay 0.9999 (fqgan.md 1.10); there is no
    warm-up of the decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start the average at the module's present parameters.

        Args:
            module: whose parameters are averaged, also frozen ones; stays unreferenced.
            decay: weight of the old average in each update, in (0, 1).

        Raises:
            ValueError: the decay is outside (0, 1).
        """
        if not 0 < decay < 1:
            raise ValueError(f"decay {decay!r}: expected a number between 0 and 1, such as 0.9999")
        self.decay = decay
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's parameters: a <- decay a + (1 - decay) p.

        Raises:
            ValueError: the module's parameter names are others.
        """
        parameters = self._matching_parameters(module)
        averages = list(self._averages.values())
        # A few fused kernels instead of two launches per parameter; torch has no public name.
        torch._foreach_mul_(averages, self.decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(averages, parameters, alpha=1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module have the averaged parameters for a block, and its own ones again after it.

        Raises:
            ValueError: the module's parameter names are others.
        """
        parameters = self._matching_parameters(module)
        with torch.no_grad():
            own = [parameter.detach().clone() for parameter in parameters]
            _copy_all(parameters, self._averages.values())
        try:
            yield
        finally:
            with torch.no_grad():
                _copy_all(parameters, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, float32; references, not copies."""
        return dict(self._averages)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore averages.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape or dtype differs; nothing is
                copied then.
        """
        copy_named_tensors(tensors, self._averages, what="averaged weights")

    def _matching_parameters(self, module: nn.Module) -> list[Tensor]:
        parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        if parameters.keys() != self._averages.keys():
            changed = sorted(parameters.keys() ^ self._averages.keys())
            raise ValueError(
                f"module {type(module).__name__}: its parameters differ from the averaged ones in "
                f"{changed[:5]}; pass the module that the average was built from"
            )
        return [parameters[name] for name in self._averages]


def _copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
