"""Bytes per GPU of what a training keeps besides activations, for each engine and world size.

All states are fp32: parameters, gradients, Adam's two moments, averaged weights. What is shared by
N ranks is padded by at most N - 1 elements, which is not counted.
Source: ZeRO, arXiv 1910.02054, figure 1; DeepSpeed 0.19.8, runtime/zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from fqgan_dist.training.config import TrainingConfig

FP32_BYTES = 4
# Parameters that ZeRO-3 keeps gathered at most, DeepSpeed's stage3_max_live_parameters.
_GATHERED_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """Bytes on one GPU."""

    parameters: int
    gradients: int
    adam_moments: int
    parameter_partition: int = 0
    """The copy that DeepSpeed's optimizer updates, of the rank's own share."""
    gathered_parameters: int = 0
    """The most that ZeRO-3 gathers for passes."""
    ema: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def compute_state_sizes(
    parameters: int, *, zero_stage: int | None, ranks: int, averaged: int = 0
) -> StateSizes:
    """Give the bytes on each of some ranks, from the numbers of trained and of averaged parameters.

    ZeRO-1 shares the moments, with a copy of the rank's parameters to update; ZeRO-2 the gradients
    too; ZeRO-3 also the parameters, which it gathers for passes, and the averaged weights. The
    plain engine (`zero_stage` None) keeps what stage 0 does.
    """
    whole = parameters * FP32_BYTES
    stage = zero_stage or 0
    share = -(-whole // ranks)
    average = averaged * FP32_BYTES
    return StateSizes(
        parameters=share if stage >= 3 else whole,
        gradients=share if stage >= 2 else whole,
        adam_moments=-(-2 * whole // ranks) if stage >= 1 else 2 * whole,
        parameter_partition=share if stage >= 1 else 0,
        gathered_parameters=min(whole, _GATHERED_PARAMETERS * FP32_BYTES) if stage >= 3 else 0,
        ema=-(-average // ranks) if stage >= 3 else average,
    )


def chosen_zero_stage(training: TrainingConfig) -> int | None:
    """Return the ZeRO stage of a training; None with the plain engine."""
    return training.zero_stage if training.engine == "deepspeed" else None


def name_engine(zero_stage: int | None) -> str:
    return "plain/DDP" if zero_stage is None else f"ZeRO-{zero_stage}"
