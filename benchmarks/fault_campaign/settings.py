"""Options of `benchmarks/faults.py`; the defaults are those of the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from benchmarks.fault_campaign.storm import FAULTS, FaultName
from benchmarks.options import parse_options
from fqgan_dist.config import Config


class Settings(Config):
    """How long, how hard, and what the simulation takes for granted."""

    minutes: float = Field(default=240.0, gt=0)
    """Of the storm; the run then goes on in calm until it is done."""
    seed: int = 1
    """Decides which fault comes when."""
    mean_pause_s: float = Field(default=60.0, gt=0)
    """Mean pause between two faults."""
    longest_s: float = Field(default=180.0, gt=0)
    """No fault lasts longer."""
    faults: list[FaultName] = Field(default=list(FAULTS), min_length=1)
    """Kinds of faults."""
    tokenizer_steps: int = Field(default=20_000, ge=1)
    """Steps of the tokenizer; the storm ends with the run if that is over before."""
    autoregressive_steps: int = Field(default=20_000, ge=1)
    """Steps of FAR."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    results: Path | None = None
    """Folder where table and JSON are kept; None: they are only printed."""
    log: Path = Path("/tmp/fqgan-faults.log")
    """Everything that the drivers say."""
    save_s: float = Field(default=1.0, gt=0)
    """simulation: seconds for which a checkpoint stops training; a copy in memory with us."""
    replacement_s: float = Field(default=180.0, ge=0)
    """simulation: seconds until a new node is there, beside the recovery as it was measured."""
    noticed: float = Field(default=0.0, ge=0, le=1)
    """simulation: fraction of losses that are announced in time."""


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Read `key=value` options.

    Raises:
        ConfigError: an argument is no option, or every problem of the options.
    """
    return parse_options(arguments, Settings, source="benchmarks/faults.py")
