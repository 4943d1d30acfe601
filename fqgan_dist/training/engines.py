"""Which engine trains a model."""

from __future__ import annotations

import os

from torch import nn

from fqgan_dist.training.engine import Engine
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.engine_settings import EngineSettings


def build_engine(module: nn.Module, settings: EngineSettings) -> Engine:
    """Build the engine that the settings name.

    Raises:
        ClusterError: DeepSpeed without a process group.
    """
    match settings.training.engine:
        case "plain":
            return PlainEngine(module, settings)
        case "deepspeed":
            # Imported here: the library works without it, and the import takes 3 seconds. When it
            # is imported it looks for an accelerator of its own accord, if none is named.
            os.environ.setdefault("DS_ACCELERATOR", settings.device.type)
            from fqgan_dist.training.engine_deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(module, settings)
