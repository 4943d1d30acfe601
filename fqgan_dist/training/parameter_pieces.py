"""Which elements of which parameters the optimizer of one rank moves.

Without ZeRO every rank moves all parameters whole. ZeRO lays parameters end to end in flat buffers
and gives each rank a contiguous part, which begins and ends anywhere in a parameter. All that is
done with parameters and their moments by name (saving, loading, averaging) goes through these
pieces, so it is written once for every engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs, Span


@dataclass(frozen=True)
class Piece:
    """Contiguous elements of a flattened parameter, and where the optimizer has them."""

    owner: Tensor
    """What the optimizer moves: the parameter itself, or a flat buffer (n,) of many."""
    shape: tuple[int, ...]
    """Of the parameter."""
    start: int
    """First element in the flattened parameter."""
    position: int
    """First element in the owner."""
    count: int
    """Elements; 0 where this rank has none of the parameter."""

    @classmethod
    def whole(cls, parameter: Tensor) -> Piece:
        return cls(parameter, tuple(parameter.shape), 0, 0, parameter.numel())

    @property
    def is_whole(self) -> bool:
        return tuple(self.owner.shape) == self.shape and self.count == self.owner.numel()

    @property
    def is_first(self) -> bool:
        """Whether it holds the parameter's first element: one rank in the world does."""
        return self.start == 0 and (self.count > 0 or math.prod(self.shape) == 0)

    def find(self, tensor: Tensor) -> Tensor:
        """View these elements in the owner or in a tensor laid out like it (a moment).

        Shaped like the parameter if the piece is whole, else flat, (count,).
        """
        if self.is_whole:
            return tensor
        return tensor.view(-1).narrow(0, self.position, self.count)

    @property
    def span(self) -> Span | None:
        """What this rank needs of a tensor shaped like the parameter; None: all of it."""
        return None if self.is_whole else Span(self.start, self.count)

    def cut(self, value: Tensor | Fragment) -> Tensor:
        """Take these elements from a tensor shaped like the parameter, or from what was read of it.

        Raises:
            ValueError: a fragment has not all of them.
        """
        if self.is_whole and isinstance(value, Tensor):
            return value
        start, values = self.start, value
        if isinstance(values, Fragment):
            start, values = start - values.start, values.tensor
        values = values.reshape(-1)
        if start < 0 or start + self.count > values.numel():
            raise ValueError(
                f"{self.count} elements from {self.start} of a tensor of shape {self.shape}: not "
                "in what was read of it; read the spans that the engine needs"
            )
        found = values.narrow(0, start, self.count)
        return found.view(self.shape) if self.is_whole else found

    def share(self, values: Tensor) -> Tensor | Fragment:
        """Label values as returned by `find` for a checkpoint."""
        return values if self.is_whole else Fragment(values, self.start, self.shape)


Pieces = Mapping[str, Piece]
"""By parameter name, also of parameters of which this rank has nothing."""


def whole_pieces(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Piece]:
    """Describe the parameters of an optimizer without partitions, in its order.

    Raises:
        ValueError: the optimizer has a parameter that is not of the module.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    pieces: dict[str, Piece] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"optimizer group {index}: a parameter of shape {tuple(parameter.shape)} is "
                    f"not of {type(module).__name__}; pass the module that was given to it"
                )
            pieces[names[id(parameter)]] = Piece.whole(parameter)
    return pieces


def needed_spans(pieces: Pieces) -> Needs:
    """Say what this rank needs of tensors shaped like the parameters."""
    return {name: piece.span for name, piece in pieces.items()}


def share_pieces(pieces: Pieces, values: Mapping[str, Tensor]) -> dict[str, Tensor | Fragment]:
    """Label what this rank has of each parameter for a checkpoint; leave out what it has not."""
    return {
        name: piece.share(values[name])
        for name, piece in pieces.items()
        if piece.count > 0 or piece.is_first
    }
