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
from fqgan_dist.training.checkpoint_format import Needs, Span
from fqgan_dist.training.named_tensors import require_same_layout
from fqgan_dist.training.parameter_pieces import Piece, Pieces

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


def needed_optimizer_state(pieces: Pieces, optimizer: torch.optim.Optimizer) -> Needs:
    """Say what this rank needs of the state of all parameters: its own moments, by name.

    Raises:
        ValueError: another optimizer than Adam or AdamW.
    """
    _require_adam(optimizer)
    moments = [key for key in _state_keys(optimizer) if key != STEP]
    needs: dict[str, Span | None] = {}
    for name, piece in pieces.items():
        needs |= {f"{name}.{key}": piece.span for key in moments}
    return needs | {f"{name}.{STEP}": None for name in _step_sources(pieces)}


def load_named_optimizer_state(
    pieces: Pieces, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor | Fragment]
) -> None:
    """Restore this rank's part of the state of all parameters, before or after a first step.

    `tensors` are by name, on any device, from ranks and engines of any kind: whole, or what
    `needed_optimizer_state` asks for.

    Raises:
        CheckpointError: a name is missing or unknown, a shape or dtype differs, or parameters that
            share a partition were stepped differently often; nothing is changed then.
        ValueError: another optimizer than Adam or AdamW.
    """
    _require_adam(optimizer)
    # Fresh tensors: a graph or a staged copy may still hold the old ones.
    states = {id(owner): _new_state(owner, optimizer) for owner in _owners(pieces)}
    require_same_layout(tensors, _expected(pieces, states), what="optimizer state")
    steps = _require_equal_steps(pieces, tensors)
    for name, piece in pieces.items():
        for key, tensor in states[id(piece.owner)].items():
            if key != STEP:
                piece.find(tensor).copy_(piece.cut(tensors[f"{name}.{key}"]))
    for owner, count in steps.items():
        states[owner][STEP].copy_(count)
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


def _step_sources(pieces: Pieces) -> dict[str, Piece]:
    """Choose the parameters whose counts of steps this rank needs: one or more for each owner."""
    sources = {name: piece for name, piece in pieces.items() if piece.count > 0}
    counted = {id(piece.owner) for piece in sources.values()}
    for name, piece in pieces.items():
        if id(piece.owner) not in counted:  # a partition of padding
            counted.add(id(piece.owner))
            sources[name] = piece
    return sources


def _require_equal_steps(
    pieces: Pieces, tensors: Mapping[str, Tensor | Fragment]
) -> dict[int, Tensor]:
    """Return the count of steps of each owner, by its id: it has but one."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, piece in _step_sources(pieces).items():
        steps = tensors[f"{name}.{STEP}"]
        if isinstance(steps, Fragment):
            raise ValueError(f"{name}.{STEP}: was not read; read what the engine needs")
        other, expected = first.setdefault(id(piece.owner), (name, steps))
        if float(steps) != float(expected):
            raise CheckpointError(
                f"optimizer state: {name} was stepped {float(steps):g} times and {other} "
                f"{float(expected):g} times, but ZeRO counts the steps of a partition once; use "
                f"training.engine=plain"
            )
    return {owner: steps for owner, (_, steps) in first.items()}


def _require_adam(optimizer: torch.optim.Optimizer) -> None:
    # AdamW derives from Adam in recent torch only; naming both does not rest on it.
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"optimizer {type(optimizer).__name__}: only torch's Adam and AdamW are supported; "
            f"add its state to training/optimizer_state.py"
        )


def _state_keys(optimizer: torch.optim.Optimizer) -> list[str]:
    keys = [STEP, "exp_avg", "exp_avg_sq"]
    return [*keys, "max_exp_avg_sq"] if optimizer.defaults["amsgrad"] else keys


def _new_state(owner: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    # As torch/optim/adam.py does in _init_group.
    options = optimizer.defaults
    is_on_device = bool(options["capturable"] or options["fused"])
    count = torch.zeros((), dtype=torch.float32, device=owner.device if is_on_device else "cpu")
    return {
        key: count if key == STEP else torch.zeros_like(owner, memory_format=torch.preserve_format)
        for key in _state_keys(optimizer)
    }
