"""What the trainer needs to know of a task; the trainer knows *when*, the task knows *what*."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from fqgan_dist.config import Config
from fqgan_dist.training.checkpoint_files import Fragment

BatchT = TypeVar("BatchT", contravariant=True)
Parts = dict[str, dict[str, Tensor | Fragment]]
"""Named parts of a checkpoint; a part maps parameter names to what a rank has of the tensors."""


class Task(Protocol, Generic[BatchT]):
    """Models, losses and optimizers of one training stage."""

    @property
    def architecture(self) -> Config:
        """The model's settings; a checkpoint of another architecture is refused."""
        ...

    def train_step(self, micro_batches: Sequence[BatchT], step: int) -> dict[str, Tensor]:
        """Run one optimizer step.

        Args:
            micro_batches: this rank's micro-batches, one per slot of the step layout.
            step: number of the step, from 1.

        Returns:
            Scalars by metric name, averaged over the global batch; the same on every rank. They
            are on the device: reading them makes the host wait.

        Raises:
            NumericsError: on CPU, when a loss or gradient is not finite; nothing has moved then.
        """
        ...

    def raise_if_not_finite(self) -> None:
        """Raise what `train_step` could not raise without waiting for the device.

        Raises:
            NumericsError: a loss or gradient since the last call was not finite. No optimizer has
                moved since that step.
        """
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure on held-out data; the same on every rank."""
        ...

    def state_dict(self) -> Parts:
        """Return what this rank saves of all that training continues from, as named parts.

        Every rank returns all names of parts; each tensor, or each fragment of one, comes from one
        rank. They are references, not copies.
        """
        ...

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what the `state_dict` of all ranks returned, merged into whole tensors.

        Raises:
            CheckpointError: a part or tensor is missing, unknown or of another shape.
        """
        ...
