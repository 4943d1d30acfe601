"""Where the processes of a run come from: settings of the cluster execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PositiveInt, Tag

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


def _name_kind(value: Any) -> str:
    return "range" if isinstance(value, list | tuple) else "number"


NumWorkers = Annotated[
    Annotated[PositiveInt, Tag("number")]
    | Annotated[tuple[PositiveInt, PositiveInt], Tag("range")],
    Discriminator(_name_kind),
]
"""A number, or the least and the most."""


class TrainWorkersConfig(ProcessResources):
    """The train workers: one process per GPU, all restarted together when one dies."""

    num_workers: NumWorkers = 1
    """Train workers, the world size; `[min, max]`: as many as there is room for, anew at each
    start, of the sizes in which the ranks can share a step."""
    size_wait_s: float = Field(default=30.0, ge=0)
    """Of a range: so long the first start waits for nodes that may yet come, and a restart for what
    others hold on the nodes that are there; then it takes the largest size that fits."""
    grow_after_s: float = Field(default=60.0, gt=0)
    """Of a range: room for more workers that stays for so long makes the training save and start
    again with them; doubled each time that it was in vain."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement group: close together, or apart."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts without a newer checkpoint after failures of unknown cause. Lost workers and nodes,
    missing resources and storage outages are waited for (`patience`); an error of the run itself
    (bad data, non-finite loss) is never retried."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    """After so long without the workers' resources they are asked for anew; must cover the boot of
    autoscaled nodes."""

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the size may change from one start to the next."""
        return self.min_workers < self.max_workers

    def of_size(self, size: int) -> Self:
        """Give the same for a group of exactly so many workers."""
        return self.model_copy(update={"num_workers": size})

    def find_problems(self) -> Iterator[str]:
        if self.max_workers < self.min_workers:
            yield (
                f"num_workers: the most ({self.max_workers}) is less than the least "
                f"({self.min_workers}); expected [min, max]"
            )
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
