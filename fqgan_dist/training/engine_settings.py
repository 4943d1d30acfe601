"""What an engine is told besides its model, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fqgan_dist.training.config import OptimizerConfig, TrainingConfig
from fqgan_dist.training.step_layout import StepLayout

ParameterGroups = Sequence[dict[str, Any]]
"""Torch optimizer groups: `params` and, where it differs, `weight_decay`."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How one model is trained on one rank."""

    name: str
    """What error messages call the model."""
    kind: Literal["plain", "deepspeed"]
    optimizer: OptimizerConfig
    layout: StepLayout
    """This rank's part in every step; with several ranks the process group must be initialised."""
    device: torch.device
    precision: Literal["fp32", "bf16"]
    """Autocast dtype; parameters stay fp32."""
    zero_stage: int
    """What DeepSpeed partitions, 0 to 3."""
    parameter_groups: ParameterGroups | None = None
    """None takes all parameters that are trained, in one group."""

    @classmethod
    def of(
        cls,
        training: TrainingConfig,
        *,
        name: str,
        layout: StepLayout,
        device: torch.device,
        parameter_groups: ParameterGroups | None = None,
    ) -> EngineSettings:
        return cls(
            name=name,
            kind=training.engine,
            optimizer=training.optimizer,
            layout=layout,
            device=device,
            precision=training.precision,
            zero_stage=training.zero_stage,
            parameter_groups=parameter_groups,
        )
