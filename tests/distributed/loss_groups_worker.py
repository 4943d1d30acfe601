"""What test_loss_groups.py compares, for one world size and number of ranks per micro-batch.

    torchrun --nproc-per-node=N tests/distributed/loss_groups_worker.py FOLDER RANKS_PER_MICRO_BATCH

World size 1 comes first: it writes the state that the others start from.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.tiny_tasks import load_tiny
from world_sizes_worker import (
    COMPARISONS,
    Comparison,
    Results,
    load_parts,
    make_double,
    prefixed,
    save_parts,
)

from fqgan_dist.loss_group import LossGroup
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.world import World

DONE = 8
"""Steps before the compared one: the discriminator takes part, all weights have moved."""


def load_config(ranks_per_micro_batch: int) -> RunConfig:
    # Four micro-batches leave idle passes to three groups. FAR's dropouts and LPIPS's are on.
    sizes = ("global_batch_size=24", "micro_batch_size=6", "steps=40")
    group = f"ranks_per_micro_batch={ranks_per_micro_batch}"
    return load_tiny(
        *(
            f"{stage}.training.{size}"
            for stage in ("tokenizer", "autoregressive")
            for size in sizes
        ),
        *(f"{stage}.training.{group}" for stage in ("tokenizer", "autoregressive")),
    )


class GroupComparison(Comparison):
    """Draws micro-batches as the loaders do: a member's share of each."""

    def run(self, task: Any, steps: range) -> None:
        for step in steps:
            whole = self.draw(self.config, step, task.layout.micro_batches)
            task.train_step(share_of(whole, task.layout.loss_group), step)


def share_of(batches: Sequence[Any], loss_group: LossGroup) -> list[Any]:
    """Cut every tensor and list of some batches to the member's samples."""

    def cut(value: Any) -> Any:
        match value:
            case dict():
                return {name: cut(each) for name, each in value.items()}
            case torch.Tensor() | list():
                return value[loss_group.rows(len(value) // loss_group.size)]
            case _:
                return value

    return [
        dataclasses.replace(batch, **{name: cut(value) for name, value in vars(batch).items()})
        for batch in batches
    ]


def compare_step(comparison: Comparison, world: World, folder: Path) -> Results:
    """Run one step from the same state, in single and, as far as it goes, double precision."""
    path = folder / f"{comparison.name}.safetensors"
    if world.world_size == 1:
        source = comparison.new_task(world)
        comparison.run(source, range(1, DONE + 1))
        save_parts(source.state_dict(), path)
    task = comparison.new_task(world)
    task.load_state_dict(load_parts(path))
    results = prefixed("single", comparison.record_step(task, DONE + 1))
    task = comparison.new_task(world, prepare=make_double)
    weights = load_parts(path)
    task.engine.module.load_state_dict(weights[comparison.name])
    if comparison.name == "tokenizer":
        task.discriminator_engine.module.load_state_dict(weights["discriminator"])
    return results | prefixed("double", comparison.record_step(task, DONE + 1))


def main() -> None:
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    world, config = World.from_environment(), load_config(size)
    if world.world_size > 1:
        dist.init_process_group("gloo")
    for comparison in COMPARISONS:
        own = GroupComparison(comparison.name, comparison.build, comparison.draw, config)
        results = compare_step(own, world, folder)
        if world.is_main:
            save_file(results, folder / f"{own.name}-{world.world_size}-{size}.safetensors")
    if world.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
