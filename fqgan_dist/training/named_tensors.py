"""Strict copies between sets of tensors that share names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training.checkpoint_files import Fragment

# Differences that an error message lists before it counts the rest.
_MAX_NAMED = 5


@torch.no_grad()
def copy_named_tensors(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], *, what: str
) -> None:
    """Copy every source tensor into the target of the same name.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype differs; nothing is
            copied then.
    """
    require_same_layout(source, target, what=what)
    for name, tensor in target.items():
        tensor.copy_(source[name])


def require_same_layout(
    tensors: Mapping[str, Tensor | Fragment], expected: Mapping[str, Tensor], *, what: str
) -> None:
    """Check that tensors have the names, shapes and dtypes of others, whose values do not matter.

    A fragment has the shape of its whole tensor.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype differs.
    """
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {_describe(tensors[name])}, expected {_describe(expected[name])}"
        for name in expected
        if name in tensors and _describe(tensors[name]) != _describe(expected[name])
    ]
    if problems:
        more = f" and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise CheckpointError(
            f"{what}: the stored tensors are of another architecture: "
            f"{'; '.join(problems[:_MAX_NAMED])}{more}; use the config they were trained with"
        )


def whole_tensors(
    values: Mapping[str, Tensor | Fragment], names: Iterable[str]
) -> dict[str, Tensor]:
    """Take some values as tensors; of a fragment, which nobody asked for, what there is, flat."""
    chosen = ((name, values[name]) for name in names)
    return {name: value.tensor if isinstance(value, Fragment) else value for name, value in chosen}


def _describe(value: Tensor | Fragment) -> str:
    tensor = value.tensor if isinstance(value, Fragment) else value
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(value.shape)}"
