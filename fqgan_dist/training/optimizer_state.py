"""State of torch's Adam and AdamW as tensors named by parameter, and back.

torch's own `state_dict` numbers parameters and pickles; here `blocks.0.weight.exp_avg` is what it
says, so any engine, world size or tool can read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fqgan_dist.training.named_tensors import copy_named_tensors


def named_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state under `<parameter name>.<key>`.

    Keys are `step` (scalar), `exp_avg`, `exp_avg_sq` and with amsgrad `max_exp_avg_sq` (like the
    parameter). A parameter that has not been stepped yet has zeros, which is what Adam starts from,
    so the names depend on the model only. Learning rates and betas are config, not state.

    Args:
        module: gives the names.
        optimizer: Adam or AdamW over parameters of the module.

    Returns:
        References to the state where there is one.

    Raises:
        ValueError: another optimizer, or a parameter that is not of the module.
    """
    return {
        f"{name}.{key}": tensor
        for name, parameter, group in _named_parameters(module, optimizer)
        for key, tensor in (optimizer.state.get(parameter) or _new_state(parameter, group)).items()
    }


def load_named_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `named_optimizer_state` returned, before or after a first step.

    Args:
        module: gives the names.
        optimizer: Adam or AdamW over parameters of the module; its state is made where it has none.
        tensors: state by name, on any device.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape or dtype differs; nothing is
            changed then.
        ValueError: another optimizer, or a parameter that is not of the module.
    """
    # Fresh tensors: a graph or a staged copy may still hold the old ones.
    states = {
        name: (parameter, _new_state(parameter, group))
        for name, parameter, group in _named_parameters(module, optimizer)
    }
    target = {
        f"{name}.{key}": tensor
        for name, (_, state) in states.items()
        for key, tensor in state.items()
    }
    copy_named_tensors(tensors, target, what="optimizer state")
    for parameter, state in states.values():
        optimizer.state[parameter] = state


def _named_parameters(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    # AdamW derives from Adam in recent torch only; naming both does not rest on it.
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"optimizer {type(optimizer).__name__}: only torch's Adam and AdamW are supported; "
            f"add its state to training/optimizer_state.py"
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"optimizer group {index}: a parameter of shape {tuple(parameter.shape)} is "
                    f"not of {type(module).__name__}; pass the module that was given to it"
                )
            yield names[id(parameter)], parameter, group


def _new_state(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the state of a parameter's first step, as torch/optim/adam.py does in _init_group."""
    is_on_device = bool(group["capturable"] or group["fused"])
    state = {
        "step": torch.zeros(
            (), dtype=torch.float32, device=parameter.device if is_on_device else "cpu"
        ),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
    if group["amsgrad"]:
        state["max_exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
