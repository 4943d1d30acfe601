"""What the loaders give: micro-batches of images or of codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """One micro-batch of images."""

    images: Tensor
    """(B, 3, H, W) uint8."""
    labels: Tensor
    """(B,) int64."""
    keys: list[str]
    """Sample keys."""
    views: list[int]
    """View of each sample."""
    features: dict[str, Tensor]
    """By teacher: stored features of these views, (B, F) float32; empty where none are stored."""
    micro_batch: int
    """Index in the global batch."""


@dataclass(frozen=True, eq=False)
class CodeBatch:
    """One micro-batch of codes."""

    codes: Tensor
    """(B, K, h, w) int64."""
    labels: Tensor
    """(B,) int64."""
    keys: list[str]
    """Sample keys."""
    views: list[int]
    """View of each sample."""
    micro_batch: int
    """Index in the global batch."""
