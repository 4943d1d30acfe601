"""Which engine trains a model."""

from __future__ import annotations

import os

import torch
from torch import nn

from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.engine import Engine
from fqgan_dist.training.engine_base import ParameterGroups
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.world import World


def build_engine(
    module: nn.Module,
    training: TrainingConfig,
    *,
    name: str,
    world: World,
    device: torch.device,
    parameter_groups: ParameterGroups | None = None,
) -> Engine:
    """Build the engine that a training asks for.

    Args:
        module: the model.
        training: engine, ZeRO stage, sizes, optimizer and precision.
        name: what error messages call the model.
        world: rank geometry.
        device: where the model lives.
        parameter_groups: optimizer groups; all parameters in one group when None.

    Raises:
        ClusterError: DeepSpeed without a process group.
    """
    match training.engine:
        case "plain":
            return PlainEngine(
                module,
                training.optimizer,
                name=name,
                world=world,
                num_micro_batches=training.micro_batches_per_step,
                device=device,
                ranks_per_micro_batch=training.ranks_per_micro_batch,
                parameter_groups=parameter_groups,
            )
        case "deepspeed":
            # Imported here: the library works without it, and the import takes 3 seconds. When it
            # is imported it looks for an accelerator of its own accord, if none is named.
            os.environ.setdefault("DS_ACCELERATOR", device.type)
            from fqgan_dist.training.engine_deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(
                module,
                training.optimizer,
                name=name,
                world=world,
                num_micro_batches=training.micro_batches_per_step,
                device=device,
                zero_stage=training.zero_stage,
                precision=training.precision,
                ranks_per_micro_batch=training.ranks_per_micro_batch,
                parameter_groups=parameter_groups,
            )
