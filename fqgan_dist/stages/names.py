"""Names of the stages."""

from __future__ import annotations

from typing import Literal

StageName = Literal[
    "shards",
    "teachers",
    "tokenizer",
    "codes",
    "autoregressive",
    "samples",
    "evaluation",
    "report",
]
STAGE_NAMES: tuple[StageName, ...] = (
    "shards",
    "teachers",
    "tokenizer",
    "codes",
    "autoregressive",
    "samples",
    "evaluation",
    "report",
)
"""Stages in the order in which they run."""
