"""Where the processes of a run come from: settings of the cluster execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fqgan_dist.config import Config


class ProcessResources(Config):
    """What one process reserves on its node."""

    cpus: float = Field(default=1.0, ge=0)
    """CPUs, as Ray counts them."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; a fraction shares one between processes of a pool."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Other Ray resources, by name, for example `{accelerator_type:A100: 0.001}`."""

    @property
    def amounts(self) -> dict[str, float]:
        """What is more than 0 of all this, by Ray's names."""
        named = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in named.items() if amount}


class TrainWorkersConfig(ProcessResources):
    """The train workers: one process per GPU, all restarted together when one dies."""

    num_workers: int = Field(default=1, gt=0)
    """Train workers, the world size."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement group: close together, or apart."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts from the newest checkpoint after a lost worker or node; an error of the run itself
    (bad data, non-finite loss) is never retried."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """Wait for the workers' resources; must cover the boot of autoscaled nodes."""

    def find_problems(self) -> Iterator[str]:
        if self.gpus not in (0.0, 1.0):
            yield (
                f"gpus: {self.gpus} per train worker; expected 0 (CPU) or 1 (one process per GPU)"
            )


class PoolConfig(ProcessResources):
    """A pool of actors that pull chunks of work; it has no state beyond what they commit."""

    min_actors: int = Field(default=1, gt=0)
    """Actors to start with."""
    max_actors: int = Field(default=1, gt=0)
    """Actors to ask for while chunks wait; equal to min_actors: a fixed size."""
    max_failures_per_chunk: int = Field(default=3, ge=0)
    """Times that a chunk may lose its actor before the pool gives up on it."""

    def find_problems(self) -> Iterator[str]:
        if self.max_actors < self.min_actors:
            yield f"max_actors: {self.max_actors} is less than min_actors ({self.min_actors})"


class RayConfig(Config):
    """What the stages reserve on a Ray cluster (`execution: ray`).

    The cluster is that of RAY_ADDRESS (set by `ray job submit`); without it a Ray of this machine
    is started for the run.
    """

    train: TrainWorkersConfig = TrainWorkersConfig()
    pools: dict[str, PoolConfig] = Field(default_factory=dict)
    """By stage, where its chunks are worked on; a stage that is not named has a pool of one."""
    local_cpus: int | None = Field(default=None, gt=0)
    """CPUs of a Ray that is started here; None takes the machine's."""

    def pool(self, stage: str) -> PoolConfig:
        return self.pools.get(stage, PoolConfig())
