"""What test_engine_deepspeed.py compares, for one world size.

    torchrun --nproc-per-node=N tests/distributed/engine_deepspeed_worker.py FOLDER

World size 1 comes first: it writes the state that all engines in all worlds start from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.engines import with_zero_stage
from support.tiny_tasks import (
    build_autoregressive_task,
    build_tokenizer_task,
    draw_codes,
    draw_images,
    load_tiny,
)
from torch import Tensor, nn

from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.engine import Engine
from fqgan_dist.training.engine_deepspeed import DeepSpeedEngine
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.world import World

# Four micro-batches leave idle slots to three ranks, three of the generator to two.
OVERRIDES = (
    "tokenizer.training.global_batch_size=8",
    "tokenizer.training.micro_batch_size=2",
    "tokenizer.training.steps=40",
    "tokenizer.losses.discriminator_start_step=2",
    "autoregressive.training.global_batch_size=12",
    "autoregressive.training.micro_batch_size=4",
    "autoregressive.training.steps=40",
    "autoregressive.training.ema_decay=0.9",
)
UNCLIPPED = tuple(
    f"{task}.training.optimizer.gradient_clip=1e9" for task in ("tokenizer", "autoregressive")
)
START = 4
"""Steps done in the common state; the discriminator has taken part in three of them."""
LAST = START + 2


@dataclass(frozen=True)
class Comparison:
    """One task: how it is built and fed, and which ZeRO stages train it."""

    name: str
    build: Callable[..., Any]
    draw: Callable[..., Any]
    zero_stages: tuple[int, ...]

    def new_task(self, world: World, engine: str, *overrides: str) -> Any:
        def build_engine(module: nn.Module, settings: EngineSettings) -> Engine:
            if engine == "plain":
                return PlainEngine(module, settings)
            return DeepSpeedEngine(module, with_zero_stage(settings, int(engine[-1])))

        return self.build(load_tiny(*OVERRIDES, *overrides), world, engine_type=build_engine)

    def run(self, task: Any, steps: range) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for step in steps:
            indices = task.layout.micro_batches
            metrics = task.train_step(self.draw(load_tiny(*OVERRIDES), step, indices), step)
        return metrics


COMPARISONS = (
    Comparison("tokenizer", build_tokenizer_task, draw_images, (0, 1, 2)),
    Comparison("autoregressive", build_autoregressive_task, draw_codes, (0, 1, 2, 3)),
)


def engines(comparison: Comparison) -> list[str]:
    return ["plain", *(f"zero{stage}" for stage in comparison.zero_stages)]


def compare(comparison: Comparison, engine: str, world: World, root: Storage) -> dict[str, Tensor]:
    """Load the common state into an engine that has trained already, save it, and go on."""
    start = load(root, f"{comparison.name}-start")
    task = comparison.new_task(world, engine)
    comparison.run(task, range(1, 2))
    task.load_state_dict(start)
    save(task, root, f"{comparison.name}-{engine}-world-{world.world_size}", world)
    metrics = comparison.run(task, range(START + 1, START + 2))
    results = prefixed("one", flat_state(task) | gradient_norms(metrics))
    evaluate(task)
    comparison.run(task, range(START + 2, LAST + 1))
    results |= prefixed("several", flat_state(task))

    task.load_state_dict(start)
    comparison.run(task, range(START + 1, LAST + 1))
    results |= prefixed("again", flat_state(task))
    return results


def record_gradient(
    comparison: Comparison, engine: str, world: World, root: Storage
) -> dict[str, Tensor]:
    """Step once without clipping from moments of zero: the first moment is (1 - beta1) gradient."""
    start = load(root, f"{comparison.name}-start")
    for part, tensors in start.items():
        if part.endswith("_optimizer"):
            start[part] = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    task = comparison.new_task(world, engine, *UNCLIPPED)
    task.load_state_dict(start)
    metrics = comparison.run(task, range(START + 1, START + 2))
    name = f"{comparison.name}-{engine}-world-{world.world_size}-gradient"
    save(task, root, name, world)
    results = gradient_norms(metrics)
    for part, tensors in load(root, name).items():
        if part.endswith("_optimizer"):
            names = sorted(name for name in tensors if name.endswith(".exp_avg"))
            results[f"gradient/{part}"] = torch.cat([tensors[name].flatten() for name in names])
    return prefixed("unclipped", results)


def evaluate(task: Any) -> None:
    """Call the model with averaged weights as an evaluation does, between two steps."""
    averages = task.ema.state_dict()
    with task.engine.whole_weights(averages) as module, torch.inference_mode():
        module.eval()
        codes = torch.zeros(1, 3, 4, 4, dtype=torch.int64)
        if task.engine.name == "autoregressive":
            module(codes, torch.zeros(1, dtype=torch.int64))
        else:
            module(torch.zeros(1, 3, 32, 32))
        module.train()


def flat_state(task: Any) -> dict[str, Tensor]:
    """Return the weights and their average as vectors, the same on every rank."""
    state: dict[str, Tensor] = {}
    for name, values in (("weights", None), ("average", task.ema.state_dict())):
        with task.engine.whole_weights(values) as module:
            state[name] = torch.cat([p.detach().flatten() for p in module.parameters()])
    if task.engine.name == "tokenizer":
        module = task.discriminator_engine.module
        state["discriminator"] = torch.cat([p.detach().flatten() for p in module.parameters()])
    return state


def gradient_norms(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        "norm/" + name.replace("/", "-"): value.reshape(1).to(torch.float32)
        for name, value in metrics.items()
        if name.endswith("gradient_norm")
    }


def save(task: Any, root: Storage, name: str, world: World) -> None:
    """Save as the trainer does: every rank what it owns."""
    store = CheckpointStore(root, name)
    attempt = store.begin_attempt(world_size=world.world_size) if world.is_main else None
    ids = [attempt.id if attempt else ""]
    dist.broadcast_object_list(ids, src=0)
    attempt = attempt or store.join_attempt(ids[0], rank=world.rank, world_size=world.world_size)
    with attempt:
        attempt.save(
            1, tensors=task.state_dict(), state={}, metrics={}, config={}, dataset_id="none"
        )
    dist.barrier()


def load(root: Storage, name: str) -> dict[str, dict[str, Tensor]]:
    loaded = CheckpointStore(root, name).load_latest()
    assert loaded is not None
    return {part: loaded.read(part) for part in loaded.manifest.parts}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor.detach().clone() for name, tensor in tensors.items()}


def run_comparisons(world: World, folder: Path) -> None:
    """Run all engines of one world size; the process group is there."""
    root = Storage(folder)
    for comparison in COMPARISONS:
        if world.world_size == 1:
            source = comparison.new_task(world, "plain")
            comparison.run(source, range(1, START + 1))
            save(source, root, f"{comparison.name}-start", world)
        for engine in engines(comparison):
            results = compare(comparison, engine, world, root)
            results |= record_gradient(comparison, engine, world, root)
            if world.is_main:
                name = f"{comparison.name}-{engine}-world-{world.world_size}.safetensors"
                save_file(results, folder / name)


def main() -> None:
    dist.init_process_group("gloo")
    run_comparisons(World.from_environment(), Path(sys.argv[1]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
