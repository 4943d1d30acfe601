"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fqgan_dist.config import Config


class ScheduleConfig(Config):
    """Linear warm-up, then a constant, cosine or linear course; FQGAN and FAR use a constant."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    kind: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to its peak; 0 starts at the peak."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the decay ends, as a fraction of the peak; cosine and linear only."""

    @model_validator(mode="after")
    def _check_effect(self) -> ScheduleConfig:
        if self.kind == "constant" and self.min_ratio:
            raise ValueError(
                f"min_ratio: {self.min_ratio} has no effect with kind: constant; "
                f"remove it, or choose kind: cosine or linear"
            )
        return self


def compute_lr(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step.

    The rate is `lr * step / warmup_steps` up to the end of the warm-up, where it is the peak; the
    step after that is at the peak too, and step `total_steps + 1` would be at `min_ratio`.

    Args:
        config: course and peak.
        step: number of the optimizer step that the rate is for, from 1.
        total_steps: steps of the whole training; later steps keep the final rate.

    Raises:
        ValueError: `step` is below 1.
    """
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    decay_steps = total_steps - config.warmup_steps
    progress = min(1.0, (step - 1 - config.warmup_steps) / decay_steps) if decay_steps > 0 else 1.0
    match config.kind:
        case "constant":
            return config.lr
        case "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            remaining = 1 - progress
    return config.lr * (config.min_ratio + (1 - config.min_ratio) * remaining)
