"""Settings of engines for tests of single models on one CPU process."""

from __future__ import annotations

from typing import Any

import torch

from fqgan_dist.training.config import OptimizerConfig
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.step_layout import build_step_layout
from fqgan_dist.world import World


def engine_settings(**changes: Any) -> EngineSettings:
    """Describe an engine; by default the plain one, in fp32, with one micro-batch per step."""
    values: dict[str, Any] = {
        "name": "network",
        "kind": "plain",
        "optimizer": OptimizerConfig(),
        "layout": build_step_layout(1, World()),
        "device": torch.device("cpu"),
        "precision": "fp32",
        "zero_stage": 1,
    }
    return EngineSettings(**(values | changes))
