"""What an engine is told besides its model, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.step_layout import StepLayout

ParameterGroups = Sequence[dict[str, Any]]
"""Torch optimizer groups: `params` and, where it differs, `weight_decay`."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How one model is trained on one rank."""

    training: TrainingConfig
    name: str
    """What error messages call the model."""
    layout: StepLayout
    """This rank's part in every step; with several ranks the process group must be initialised."""
    device: torch.device
    parameter_groups: ParameterGroups | None = None
    """None takes all parameters that are trained, in one group."""
