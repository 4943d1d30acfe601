"""Settings of engines for tests of single models on one CPU process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.engine_settings import EngineSettings, ParameterGroups
from fqgan_dist.training.step_layout import StepLayout, build_step_layout
from fqgan_dist.world import World


def engine_settings(
    *,
    name: str = "network",
    layout: StepLayout | None = None,
    parameter_groups: ParameterGroups | None = None,
    **training: Any,
) -> EngineSettings:
    """Describe an engine; by default the plain one, in fp32, with one micro-batch per step."""
    values: dict[str, Any] = {
        "steps": 1,
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "precision": "fp32",
        "schedule": {"lr": 0.0001},
        "evaluate_every": 1,
        "evaluation_samples": 1,
        "checkpoint": {"every": 1},
    }
    return EngineSettings(
        training=TrainingConfig.model_validate(values | training),
        name=name,
        layout=layout or build_step_layout(1, World()),
        device=torch.device("cpu"),
        parameter_groups=parameter_groups,
    )


def with_zero_stage(settings: EngineSettings, zero_stage: int) -> EngineSettings:
    training = settings.training.model_copy(update={"zero_stage": zero_stage})
    return replace(settings, training=training)
