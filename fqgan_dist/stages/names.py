"""Names of the stages."""

from __future__ import annotations

from typing import Literal, get_args

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
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
"""Stages in the order in which they run."""
