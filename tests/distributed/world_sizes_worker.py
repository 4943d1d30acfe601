"""What test_world_sizes.py compares, for one world size.

    torchrun --nproc-per-node=N tests/distributed/world_sizes_worker.py FOLDER

World size 1 comes first: it writes the states that the others start from, and the control runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.tiny_tasks import (
    build_autoregressive_task,
    build_tokenizer_task,
    draw_codes,
    draw_images,
    load_tiny,
)
from torch import Tensor, nn

from fqgan_dist.randomness import torch_generator
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.task import Parts
from fqgan_dist.world import World

Results = dict[str, Tensor]

# Four micro-batches leave idle slots to three ranks, three micro-batches to two.
CONFIG = load_tiny(
    "tokenizer.training.global_batch_size=8",
    "tokenizer.training.micro_batch_size=2",
    "tokenizer.training.steps=40",
    "tokenizer.losses.discriminator_start_step=3",
    "autoregressive.training.global_batch_size=12",
    "autoregressive.training.micro_batch_size=4",
    "autoregressive.training.steps=40",
    "autoregressive.training.ema_decay=0.9",
)
STATES = {"fresh": 0, "discriminator_starts": 2, "late": 8}
"""Steps done in the states that one step is compared from."""
TOKENIZER_STEPS = 12
AUTOREGRESSIVE_STEPS = 20
NUM_CONTROLS = 3


class RecordingEngine(PlainEngine):
    """Keeps the losses and summed gradients that the last step was given."""

    losses: Tensor
    gradient: Tensor

    def step(self, *, lr: float, losses: Tensor) -> Tensor:
        self.losses = losses.clone()
        self.gradient = torch.cat(
            [p.grad.flatten() for p in self._parameters if p.grad is not None]
        )
        return super().step(lr=lr, losses=losses)


class Comparison:
    """One task in one world: where its steps come from and what is recorded of them."""

    def __init__(
        self,
        name: str,
        build: Callable[..., Any],
        draw: Callable[..., Any],
        config: RunConfig = CONFIG,
    ) -> None:
        self.name = name
        self.build = build
        self.draw = draw
        self.config = config

    def new_task(self, world: World, **options: Any) -> Any:
        return self.build(self.config, world, engine_type=RecordingEngine, **options)

    def run(self, task: Any, steps: range) -> None:
        for step in steps:
            indices = task.layout.micro_batches
            task.train_step(self.draw(self.config, step, indices), step)

    def record_step(self, task: Any, step: int) -> Results:
        """Run one step and return all that must not depend on the world size."""
        self.run(task, range(step, step + 1))
        engines = {"main": task.engine}
        if (
            self.name == "tokenizer"
            and step >= self.config.tokenizer.losses.discriminator_start_step
        ):
            engines["discriminator"] = task.discriminator_engine
        results: Results = {}
        for name, engine in engines.items():
            results[f"{name}/losses"] = engine.losses
            results[f"{name}/gradient"] = engine.gradient
        if self.name == "tokenizer":
            results["folded/usage"] = task.usage.codes
            results |= {
                f"folded/{name}": buffer for name, buffer in task.discriminator.named_buffers()
            }
        return results


COMPARISONS = (
    Comparison("tokenizer", build_tokenizer_task, draw_images),
    Comparison("autoregressive", build_autoregressive_task, draw_codes),
)


def compare_steps(comparison: Comparison, world: World, folder: Path) -> Results:
    """Run one step from each state."""
    results: Results = {}
    if world.world_size == 1:
        source, done = comparison.new_task(world), 0
        for state, steps in STATES.items():
            comparison.run(source, range(done + 1, steps + 1))
            done = steps
            save_parts(source.state_dict(), folder / f"{comparison.name}-{state}.safetensors")
    for state, steps in STATES.items():
        task = comparison.new_task(world)
        task.load_state_dict(load_parts(folder / f"{comparison.name}-{state}.safetensors"))
        results |= prefixed(state, comparison.record_step(task, steps + 1))
    late = load_parts(folder / f"{comparison.name}-late.safetensors")
    task = comparison.new_task(world, prepare=make_double)
    task.engine.module.load_state_dict(late[comparison.name])
    results |= prefixed("double", comparison.record_step(task, STATES["late"] + 1))
    return results


def run_trajectories(comparison: Comparison, world: World) -> Results:
    """Train from the start; in the world of one also from starts that are one bit away."""
    steps = TOKENIZER_STEPS if comparison.name == "tokenizer" else AUTOREGRESSIVE_STEPS
    task = comparison.new_task(world)
    comparison.run(task, range(1, steps + 1))
    results = {"trajectory": flat_weights(task.engine.module)}
    if world.world_size > 1:
        weights = [torch.empty_like(results["trajectory"]) for _ in range(world.world_size)]
        dist.all_gather(weights, results["trajectory"])
        assert all(torch.equal(weights[0], each) for each in weights), "ranks have drifted apart"
        return results
    for number in range(NUM_CONTROLS):
        task = comparison.new_task(world)
        move_by_one_ulp(task.engine.module, torch_generator("ulp", number))
        comparison.run(task, range(1, steps + 1))
        results[f"control-{number}"] = flat_weights(task.engine.module)
    return results


def make_double(module: nn.Module) -> None:
    """Let parameters, their layers and gradients be float64; code lookup and losses stay fp32."""
    module.double()
    kinds = nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d
    for layer in module.modules():
        if isinstance(layer, kinds):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))


@torch.no_grad()
def move_by_one_ulp(module: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter to a neighbouring float, up or down at random."""
    for parameter in module.parameters():
        direction = torch.randint(2, parameter.shape, generator=generator) * 2.0 - 1
        parameter.copy_(torch.nextafter(parameter, direction * torch.inf))


def flat_weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def prefixed(prefix: str, tensors: Results) -> Results:
    return {f"{prefix}/{name}": tensor.detach().clone() for name, tensor in tensors.items()}


def save_parts(parts: Parts, path: Path) -> None:
    save_file(
        {
            f"{part}|{name}": tensor.detach().clone().contiguous()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        },
        path,
    )


def load_parts(path: Path) -> Parts:
    parts: Parts = {}
    for key, tensor in load_file(path).items():
        part, _, name = key.partition("|")
        parts.setdefault(part, {})[name] = tensor
    return parts


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = World.from_environment()
    if world.world_size > 1:
        dist.init_process_group("gloo")
    for comparison in COMPARISONS:
        results = compare_steps(comparison, world, folder)
        results |= prefixed("long", run_trajectories(comparison, world))
        if world.is_main:
            save_file(results, folder / f"{comparison.name}-world-{world.world_size}.safetensors")
    if world.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
