"""The interface between a task and what runs its forward passes, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
from fqgan_dist.training.step_layout import Slot, StepLayout

BatchT = TypeVar("BatchT")


class Engine(Protocol):
    """One model with its optimizer, on one rank of a world."""

    @property
    def module(self) -> nn.Module:
        """The bare model, for calls outside its own training pass."""
        ...

    @property
    def layout(self) -> StepLayout:
        """This rank's part in every step."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        ...

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the model for training."""
        ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Enclose the forward and backward pass of one slot; gradients are summed at the last."""
        ...

    def backward(self, loss: Tensor, slot: Slot) -> None:
        """Add the slot's share (1/(M * g), or 0 when idle) of the loss's gradient."""
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """Take the parameters out of autograd while another model's loss flows through."""
        ...

    def require_frozen(self) -> None:
        """Check that `frozen` is in force.

        Raises:
            NumericsError: a parameter would receive a gradient. ZeRO-1 would then train wrongly
                without a sound (systems.md E).
        """
        ...

    def step(self, *, lr: float, losses: Tensor) -> Tensor:
        """Clip, check and apply the gradients, then clear them.

        A step of numbers that are not finite is refused on the device: it moves nothing. What
        becomes of later steps is said by `training.anomalies`.

        Args:
            lr: learning rate of this step.
            losses: values whose finiteness is checked with the gradients', any shape, the same on
                every rank.

        Returns:
            Global gradient norm before clipping, a scalar on the device.
        """
        ...

    def advance(self, num_steps: int) -> None:
        """Put the optimizer where `num_steps` steps of zero gradient would have put it."""
        ...

    @property
    def refused(self) -> Tensor:
        """Whether the last step was refused, a bool scalar on the device."""
        ...

    def raise_if_not_finite(self) -> None:
        """Wait for the device and raise if a step was refused.

        Raises:
            NumericsError: a loss or gradient was not finite.
        """
        ...

    def state_dict(self) -> dict[str, dict[str, Tensor | Fragment]]:
        """Return what this rank saves of the parts `weights` and `optimizer`, by parameter name.

        All ranks together return every tensor once, whole or in fragments.
        """
        ...

    def needed_state(self) -> dict[str, Needs]:
        """Say what this rank needs of both parts to be restored."""
        ...

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        """Restore both parts, which ranks and engines of any kind saved; every rank calls it.

        All names are there: what `needed_state` asks for, or whole tensors.

        Raises:
            CheckpointError: a name is missing or unknown, or a shape or dtype differs.
        """
        ...

    def local_parameters(self) -> dict[str, Tensor]:
        """Return the values of all parameters that this rank keeps, without gradient.

        Whole parameters, or under ZeRO-3 flat pieces of them (some empty): references, which a
        step changes in place.
        """
        ...

    def share(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | Fragment]:
        """Return what this rank saves of values laid out like the local parameters."""
        ...

    def needed_parameters(self) -> Needs:
        """Say what `localize` takes of values of whole parameters."""
        ...

    def localize(self, values: Mapping[str, Tensor | Fragment]) -> dict[str, Tensor]:
        """Cut values of whole parameters as the local parameters are cut.

        They are whole, or what `needed_parameters` asks for.
        """
        ...

    def whole_weights(
        self, values: Mapping[str, Tensor] | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Give a block the model with whole parameters; every rank enters it.

        It is for calls without gradient, in the block only, which change no weight.

        Args:
            values: taken for the parameters, laid out like the local ones; None takes their own.
        """
        ...


def accumulate(
    engine: Engine,
    micro_batches: Sequence[BatchT],
    loss_fn: Callable[[Slot, BatchT], tuple[Tensor, Tensor]],
) -> Tensor:
    """Run all passes of a step and sum the gradients.

    `loss_fn` maps each slot of the engine's layout and its batch to a scalar loss and metrics (n,)
    without gradient. Returns the metrics of all micro-batches in order, (M, n), the same on every
    rank: the mean over the members of each loss group.
    """
    rows = []
    slots = engine.layout.slots
    for position, (slot, batch) in enumerate(zip(slots, micro_batches, strict=True)):
        with engine.micro_batch(is_last=position == len(slots) - 1):
            loss, metrics = loss_fn(slot, batch)
            engine.backward(loss, slot)
        rows.append(metrics)
    return engine.layout.gather_in_order(torch.stack(rows)).mean(dim=1)
