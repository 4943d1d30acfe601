"""State of torch's Adam and AdamW as tensors named by parameter, and back.

torch's own `state_dict` numbers parameters and pickles; here `blocks.0.weight.exp_avg` is what it
says, so any engine, world size or tool can read it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.named_tensors import require_same_layout
from fqgan_dist.training.parameter_pieces import Pieces

STEP = "step"


def named_optimizer_state(
    pieces: Pieces, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor | Fragment]:
    """Return what this rank has of the state of Adam or AdamW under `<parameter name>.<key>`.

    Keys are `step` (scalar), `exp_avg`, `exp_avg_sq` and with amsgrad `max_exp_avg_sq` (like the
    parameter): references, of ranks with partitions fragments. A parameter that has not been
    stepped yet has zeros, which is what Adam starts from, so the names depend on the model only.
    The count of steps is given by the rank with a parameter's first element. Learning rates and
    betas are config, not state.

    Raises:
        ValueError: another optimizer.
    """
    _require_adam(optimizer)
    # Once for each owner: ZeRO's flat buffers have many pieces, and the state is twice the buffer.
    states = {
        id(owner): optimizer.state.get(owner) or _new_state(owner, optimizer)
        for owner in _owners(pieces)
    }
    named: dict[str, Tensor | Fragment] = {}
    for name, piece in pieces.items():
        for key, tensor in states[id(piece.owner)].items():
            if key == STEP and piece.is_first:
                named[f"{name}.{key}"] = tensor
            elif key != STEP and (piece.count > 0 or piece.is_first):
                named[f"{name}.{key}"] = piece.share(piece.find(tensor))
    return named


def load_named_optimizer_state(
    pieces: Pieces, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Restore this rank's part of the state of all parameters, before or after a first step.

    `tensors` are whole, by name, on any device, from ranks and engines of any kind.

    Raises:
        CheckpointError: a name is missing or unknown, a shape or dtype differs, or parameters that
            share a partition were stepped differently often; nothing is changed then.
        ValueError: another optimizer than Adam or AdamW.
    """
    _require_adam(optimizer)
    # Fresh tensors: a graph or a staged copy may still hold the old ones.
    states = {id(owner): _new_state(owner, optimizer) for owner in _owners(pieces)}
    require_same_layout(tensors, _expected(pieces, states), what="optimizer state")
    _require_equal_steps(pieces, tensors)
    for name, piece in pieces.items():
        for key, tensor in states[id(piece.owner)].items():
            source = tensors[f"{name}.{key}"]
            target, source = (
                (tensor, source) if key == STEP else (piece.find(tensor), piece.cut(source))
            )
            target.copy_(source)
    for owner in _owners(pieces):
        optimizer.state[owner] = states[id(owner)]


def reset_optimizer_state(
    pieces: Pieces, optimizer: torch.optim.Optimizer, *, num_steps: int
) -> None:
    """Put an optimizer where a number of steps with zero gradients would have put it.

    Raises:
        ValueError: another optimizer than Adam or AdamW.
    """
    _require_adam(optimizer)
    for owner in _owners(pieces):
        state = _new_state(owner, optimizer)
        state[STEP].fill_(num_steps)
        optimizer.state[owner] = state


def _owners(pieces: Pieces) -> list[Tensor]:
    return list({id(piece.owner): piece.owner for piece in pieces.values()}.values())


def _expected(pieces: Pieces, states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": torch.empty(
            tensor.shape if key == STEP else piece.shape, dtype=tensor.dtype, device="meta"
        )
        for name, piece in pieces.items()
        for key, tensor in states[id(piece.owner)].items()
    }


def _require_equal_steps(pieces: Pieces, tensors: Mapping[str, Tensor]) -> None:
    # An owner has but one count of steps.
    first: dict[int, tuple[str, float]] = {}
    for name, piece in pieces.items():
        steps = float(tensors[f"{name}.{STEP}"])
        other, expected = first.setdefault(id(piece.owner), (name, steps))
        if steps != expected:
            raise CheckpointError(
                f"optimizer state: {name} was stepped {steps:g} times and {other} {expected:g} "
                f"times, but ZeRO counts the steps of a partition once; use training.engine=plain"
            )


def _require_adam(optimizer: torch.optim.Optimizer) -> None:
    # AdamW derives from Adam in recent torch only; naming both does not rest on it.
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"optimizer {type(optimizer).__name__}: only torch's Adam and AdamW are supported; "
            f"add its state to training/optimizer_state.py"
        )


def _new_state(owner: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    # As torch/optim/adam.py does in _init_group.
    options = optimizer.defaults
    is_on_device = bool(options["capturable"] or options["fused"])
    state = {
        STEP: torch.zeros((), dtype=torch.float32, device=owner.device if is_on_device else "cpu"),
        "exp_avg": torch.zeros_like(owner, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(owner, memory_format=torch.preserve_format),
    }
    if options["amsgrad"]:
        state["max_exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    return state
