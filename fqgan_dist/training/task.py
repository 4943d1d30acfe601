"""What the trainer needs to know of a task; the trainer knows *when*, the task knows *what*."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from fqgan_dist.config import Config
from fqgan_dist.training.anomalies import Evidence
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs

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
        """
        ...

    def take_evidence(self) -> Sequence[Evidence]:
        """Give the numbers of the last step, for each optimizer in their order."""
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

    def needed_state(self) -> Mapping[str, Needs]:
        """Say what this rank needs of the parts to be restored; of one not named, all of it."""
        ...

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        """Restore what the `state_dict` of all ranks returned, merged; every rank calls it.

        All names of all parts are there: what `needed_state` asks for, or whole tensors.

        Raises:
            CheckpointError: a part or tensor is missing, unknown or of another shape.
        """
        ...
