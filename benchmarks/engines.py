"""Train both stages with every engine in one process, save, and restore: what holds on this device?

    python benchmarks/engines.py [CONFIG] [steps=5] [warmup=2] [key.sub=value ...] [--json]

Networks, batch sizes, optimizer and precision are the config's; without one, the largest preset's
on a GPU and the quickstart's on a CPU. Images, features and codes are random, the perceptual
network has random weights, and the discriminator takes part from the first step. Neither Ray nor a
dataset nor a network connection is needed. Each row is a process of its own. Exit code 1: an engine
failed, or did not restore what it had saved to the bit.
"""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

from fqgan_dist.autoregressive.optimization import decay_groups
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.config import load_config
from fqgan_dist.data.batches import CodeBatch, ImageBatch
from fqgan_dist.randomness import torch_generator
from fqgan_dist.stages.autoregressive_task import AutoregressiveTask
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.tokenizer_task import DiscriminatorPasses, TokenizerTask
from fqgan_dist.stages.train import join_ranks
from fqgan_dist.storage.storage import Storage
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.perceptual import build_perceptual_loss
from fqgan_dist.training.checkpoint import CheckpointStore
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.engines import build_engine
from fqgan_dist.training.step_layout import StepLayout
from fqgan_dist.world import World

ROOT = Path(__file__).resolve().parents[1]
GPU_CONFIG = ROOT / "configs" / "presets" / "triple_f16_far_large.yaml"
CPU_CONFIG = ROOT / "configs" / "quickstart.yaml"
ENGINES = {"tokenizer": ("plain", 0, 1, 2), "autoregressive": ("plain", 0, 1, 2, 3)}
COMMON = (
    "num_threads=null",
    "tokenizer.losses.discriminator_start_step=1",
    "tokenizer.perceptual.weights=random",
)
NO_GPU = (
    "NO GPU: torch sees none, so this ran with gloo on the CPU. It shows that the engines train, "
    "save and restore; its times and memory say nothing about GPUs or nccl."
)


@dataclass(frozen=True)
class Case:
    """One row: a stage with an engine."""

    stage: str
    engine: str | int
    config_path: str
    overrides: tuple[str, ...]
    warmup: int
    steps: int

    @property
    def label(self) -> str:
        """Name of the engine in the table."""
        return "plain" if self.engine == "plain" else f"ZeRO-{self.engine}"

    def load_config(self) -> RunConfig:
        """Load the settings of this case."""
        training = f"{self.stage}.training"
        chosen = (
            (f"{training}.engine=plain",)
            if self.engine == "plain"
            else (f"{training}.engine=deepspeed", f"{training}.zero_stage={self.engine}")
        )
        return load_config(self.config_path, [*COMMON, *self.overrides, *chosen], RunConfig)


@dataclass(frozen=True)
class Row:
    """What was measured."""

    stage: str
    engine: str
    backend: str = ""
    precision: str = ""
    parameters: int = 0
    images_per_step: int = 0
    step_ms: float = 0.0
    peak_gib: float = 0.0
    loss: float = 0.0
    gradient_norm: float = 0.0
    save_stall_ms: float = 0.0
    save_s: float = 0.0
    checkpoint_gib: float = 0.0
    restore_s: float = 0.0
    is_restored_to_the_bit: bool = False
    error: str = ""


def main(arguments: Sequence[str]) -> int:
    """Run all cases and print them."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    is_json = "--json" in arguments
    rest = [text for text in arguments if text != "--json"]
    has_gpu = torch.cuda.is_available()
    path = (
        str(rest.pop(0))
        if rest and "=" not in rest[0]
        else str(GPU_CONFIG if has_gpu else CPU_CONFIG)
    )
    own = dict(text.split("=", 1) for text in rest if text.startswith(("steps=", "warmup=")))
    overrides = tuple(text for text in rest if text.split("=", 1)[0] not in own)
    cases = [
        Case(
            stage,
            engine,
            path,
            (*overrides, f"device={'cuda' if has_gpu else 'cpu'}"),
            warmup=int(own.get("warmup", 2)),
            steps=int(own.get("steps", 5)),
        )
        for stage, engines in ENGINES.items()
        for engine in engines
    ]
    rows = [run_alone(case) for case in cases]
    print(to_json(rows, path) if is_json else to_table(rows, path))
    return 0 if all(row.is_restored_to_the_bit for row in rows) else 1


def run_alone(case: Case) -> Row:
    """Run a case in a process of its own, so that each starts with an empty GPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        try:
            return executor.submit(run_case, case).result()
        except Exception:  # noqa: BLE001  a row says what went wrong, the others still run
            return Row(case.stage, case.label, error=traceback.format_exc(limit=-3))


def run_case(case: Case) -> Row:
    """Train, save, restore into a second task, and compare."""
    config, world = case.load_config(), World()
    training = getattr(config, case.stage).training
    with join_ranks(config, world), tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")
        build: Callable[..., Any] = {
            "tokenizer": build_tokenizer_task,
            "autoregressive": build_autoregressive_task,
        }[case.stage]
        task, batches = build(config, world, device)
        metrics, step_s = train(task, batches, case, device)
        peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        saved = save(task, CheckpointStore(Storage(folder), case.stage), case.steps)
        state = {part: copy_to_cpu(tensors) for part, tensors in task.state_dict().items()}
        start = time.perf_counter()
        restore(task, CheckpointStore(Storage(folder), case.stage))
        restore_s = time.perf_counter() - start
        restored = {part: copy_to_cpu(tensors) for part, tensors in task.state_dict().items()}
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        return Row(
            stage=case.stage,
            engine=case.label,
            backend=dist.get_backend() if dist.is_initialized() else "none",
            precision=training.precision,
            parameters=count_parameters(task),
            images_per_step=training.global_batch_size,
            step_ms=1000 * step_s,
            peak_gib=peak_bytes / 2**30,
            loss=float(metrics[f"{case.stage}/loss/total"]),
            gradient_norm=float(metrics[f"{case.stage}/gradient_norm"]),
            save_stall_ms=1000 * saved[0],
            save_s=saved[1],
            checkpoint_gib=size / 2**30,
            restore_s=restore_s,
            is_restored_to_the_bit=is_equal(state, restored),
        )


def train(
    task: Any, batches: Iterator[Any], case: Case, device: torch.device
) -> tuple[dict[str, Tensor], float]:
    """Run the steps and return the last one's metrics and the mean seconds of a timed one."""
    metrics: dict[str, Tensor] = {}
    start = 0.0
    for step in range(1, case.warmup + case.steps + 1):
        if step == case.warmup + 1:
            wait_for(device)
            start = time.perf_counter()
        metrics = task.train_step(next(batches), step)
    wait_for(device)
    step_s = (time.perf_counter() - start) / case.steps
    for engine in task.engines.values():
        engine.raise_if_not_finite()
    return metrics, step_s


def save(task: Any, store: CheckpointStore, step: int) -> tuple[float, float]:
    """Save as training does; return the seconds that training waits, and those to the commit."""
    start = time.perf_counter()
    with store.begin_attempt() as attempt:
        attempt.save(
            step, tensors=task.state_dict(), state={}, metrics={}, config={}, dataset_id="random"
        )
        stalled_s = time.perf_counter() - start
    return stalled_s, time.perf_counter() - start


def restore(task: Any, store: CheckpointStore) -> None:
    """Spoil what is there, then load."""
    for engine in (task.engine, getattr(task, "discriminator_engine", task.engine)):
        engine.advance(1)
        with torch.no_grad():
            for value in engine.local_parameters().values():
                value.zero_()
    parts = store.read_newest(lambda loaded: loaded.read_parts(task.needed_state()))
    assert parts is not None, "a checkpoint was just saved"
    task.load_state_dict(parts)


def build_tokenizer_task(
    config: RunConfig, world: World, device: torch.device
) -> tuple[TokenizerTask, Iterator[list[ImageBatch]]]:
    """Build the tokenizer's task as the stage does, and random images for it."""
    settings = config.tokenizer
    torch.manual_seed(0)
    tokenizer = FactorizedTokenizer(settings.model)
    discriminator = DiscriminatorPasses(PatchDiscriminator(settings.discriminator))
    layout = StepLayout.of(settings.training, world)
    engine = functools.partial(
        EngineSettings, training=settings.training, layout=layout, device=device
    )
    task = TokenizerTask(
        engine=build_engine(tokenizer, engine(name="tokenizer")),
        discriminator_engine=build_engine(discriminator, engine(name="discriminator")),
        perceptual=build_perceptual_loss(settings.perceptual).to(device),
        teachers=None,
        losses=settings.losses,
        training=settings.training,
        evaluate_fn=lambda _: {},
    )
    return task, draw_images(config)


def build_autoregressive_task(
    config: RunConfig, world: World, device: torch.device
) -> tuple[AutoregressiveTask, Iterator[list[CodeBatch]]]:
    """Build the generator's task as the stage does, and random codes for it."""
    settings = config.autoregressive
    torch.manual_seed(0)
    model = FactorizedTransformer(settings.model)
    groups = decay_groups(model, settings.training.optimizer.weight_decay)
    engine = EngineSettings(
        training=settings.training,
        name="autoregressive",
        layout=StepLayout.of(settings.training, world),
        device=device,
        parameter_groups=[dict(group) for group in groups],
    )
    task = AutoregressiveTask(
        engine=build_engine(model, engine),
        training=settings.training,
        codebook_names=[book.name for book in config.tokenizer.model.codebooks],
        evaluate_fn=lambda _: {},
    )
    return task, draw_codes(config)


def draw_images(config: RunConfig) -> Iterator[list[ImageBatch]]:
    """Draw the micro-batches of step after step."""
    training, model = config.tokenizer.training, config.tokenizer.model
    count, size = training.micro_batch_size, model.image_size
    generator = torch_generator("engines benchmark", "images")
    while True:
        yield [
            ImageBatch(
                images=torch.randint(256, (count, 3, size, size), generator=generator).byte(),
                labels=torch.zeros(count, dtype=torch.int64),
                keys=[str(row) for row in range(count)],
                views=[0] * count,
                features={
                    book.teacher: torch.randn(count, book.feature_dim or 0, generator=generator)
                    for book in model.codebooks
                    if book.teacher is not None
                },
                micro_batch=index,
            )
            for index in range(training.micro_batches_per_step)
        ]


def draw_codes(config: RunConfig) -> Iterator[list[CodeBatch]]:
    """Draw the micro-batches of step after step."""
    training, model = config.autoregressive.training, config.autoregressive.model
    count, grid = training.micro_batch_size, model.grid_size
    shape = (count, model.num_codebooks, grid, grid)
    generator = torch_generator("engines benchmark", "codes")
    while True:
        yield [
            CodeBatch(
                codes=torch.randint(model.codebook_size, shape, generator=generator),
                labels=torch.randint(model.num_classes, (count,), generator=generator),
                keys=[str(row) for row in range(count)],
                views=[0] * count,
                micro_batch=index,
            )
            for index in range(training.micro_batches_per_step)
        ]


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_parameters(task: Any) -> int:
    """Count what is trained; at world 1 a rank has all of it, also under ZeRO-3."""
    engines = [task.engine, *filter(None, [getattr(task, "discriminator_engine", None)])]
    return sum(p.numel() for engine in engines for p in engine.local_parameters().values())


def copy_to_cpu(tensors: dict[str, Tensor | Fragment]) -> dict[str, Tensor]:
    """Copy what a task saves."""
    return {
        name: (value.tensor if isinstance(value, Fragment) else value).detach().cpu().clone()
        for name, value in tensors.items()
    }


def is_equal(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> bool:
    """Whether two states are the same to the bit."""
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(tensor, other[part][name]) for name, tensor in one[part].items())
        for part in one
    )


def describe_machine() -> dict[str, str]:
    """Name what the numbers depend on."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    nccl_version = ".".join(map(str, nccl.version())) if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "nccl": nccl_version,
    }


def to_json(rows: Sequence[Row], config_path: str) -> str:
    """Write the rows, and what they were measured on, as JSON."""
    report: dict[str, Any] = {"machine": describe_machine(), "config": Path(config_path).name}
    if not torch.cuda.is_available():
        report["warning"] = NO_GPU
    return json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=2)


def to_table(rows: Sequence[Row], config_path: str) -> str:
    """Write the rows, and what they were measured on, for a reader."""
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    lines = [f"{Path(config_path).name}, one process; {machine}"]
    if not torch.cuda.is_available():
        lines += ["", NO_GPU]
    lines += [
        "",
        "stage           engine  backend prec  M params  step ms  peak GiB      loss  grad norm"
        "  stall ms  save s  restore s  restored",
    ]
    for row in rows:
        lines.append(
            f"{row.stage:<15} {row.engine:<7} {row.backend:<7} {row.precision:<4}"
            f" {row.parameters / 1e6:9.2f} {row.step_ms:8.1f} {row.peak_gib:9.2f} {row.loss:9.5f}"
            f" {row.gradient_norm:10.5f} {row.save_stall_ms:9.1f} {row.save_s:7.2f}"
            f" {row.restore_s:10.2f}  " + ("to the bit" if row.is_restored_to_the_bit else "NO")
        )
        if row.error:
            lines.append(f"    FAILED: {row.error.strip().splitlines()[-1]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
