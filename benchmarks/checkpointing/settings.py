"""Options of `benchmarks/checkpoint.py`; the defaults are those of the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fqgan_dist.config import Config

SubjectName = Literal["saves", "training", "restore"]


class Settings(Config):
    """What is measured, and with how much work."""

    subject: list[SubjectName] = Field(default=["saves", "training", "restore"], min_length=1)
    """Parts of the benchmark, in this order."""
    folder: Path | None = None
    """Folder on the disk that is measured, where up to eight checkpoints are written and removed at
    the end; None: one in TMPDIR."""
    memory_folder: Path = Path("/dev/shm")
    """The same on a file system in memory: what the disk has no part in."""
    results: Path | None = None
    """Folder where table and JSON are kept; None: they are only printed."""
    params_m: float = Field(default=100.0, gt=0)
    """Millions of parameters; weights and Adam's two moments are float32, so 12 bytes each."""
    rounds: int = Field(default=5, ge=1)
    """saves, restore: rounds of the paired comparisons."""
    loops: int = Field(default=2, ge=1)
    """training: rounds, of one loop of each contestant."""
    steps: int = Field(default=20, ge=2)
    """training: steps of a loop."""
    every: int = Field(default=5, ge=1)
    """training: steps between saves; those before the first save are the clean ones."""
    step_s: float = Field(default=0.2, gt=0)
    """training: seconds of a step, which is matrix products."""
    threads: int = Field(default=1, ge=1)
    """Threads of torch. Fewer than cores leave room for the writer, as a training on a GPU does."""

    def find_problems(self) -> list[str]:
        if self.steps <= self.every:
            return [
                f"steps: {self.steps} leave none beside a save; expected more than every "
                f"({self.every})"
            ]
        return []
