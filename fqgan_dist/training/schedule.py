"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from fqgan_dist.training.config import ScheduleConfig


def compute_lr(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of an optimizer step, counted from 1.

    The rate is `lr * step / warmup_steps` up to the end of the warm-up, where it is the peak; the
    step after that is at the peak too, and step `total_steps + 1` would be at `min_ratio`. Later
    steps keep the final rate.

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
