"""Both training tasks with networks of the real classes, a few thousand parameters each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.autoregressive.optimization import decay_groups
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.config import load_config
from fqgan_dist.data.batches import CodeBatch, ImageBatch
from fqgan_dist.randomness import keyed_torch_rng, torch_generator
from fqgan_dist.stages.autoregressive_task import AutoregressiveTask
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.tokenizer_task import (
    DiscriminatorPasses,
    TeacherFeatures,
    TokenizerTask,
)
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.perceptual import build_perceptual_loss
from fqgan_dist.training.engine import Engine
from fqgan_dist.training.engine_plain import PlainEngine
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.step_layout import StepLayout
from fqgan_dist.world import World

TINY_CONFIG = Path(__file__).with_name("tiny.yaml")
CPU = torch.device("cpu")
BuildEngine = Callable[[torch.nn.Module, EngineSettings], Engine]


def load_tiny(*overrides: str) -> RunConfig:
    """Load the tiny run's settings."""
    return load_config(TINY_CONFIG, overrides, RunConfig)


def build_tokenizer_task(
    config: RunConfig,
    world: World | None = None,
    *,
    engine_type: BuildEngine = PlainEngine,
    teachers: TeacherFeatures | None = None,
    prepare: Callable[[torch.nn.Module], object] = lambda module: module,
) -> TokenizerTask:
    """Build the tokenizer's task; `prepare` may change a network before its engine takes it."""
    settings = config.tokenizer
    with keyed_torch_rng(settings.training.seed, "tiny tokenizer", device=CPU):
        tokenizer = FactorizedTokenizer(settings.model)
        discriminator = DiscriminatorPasses(PatchDiscriminator(settings.discriminator))
    prepare(tokenizer)
    prepare(discriminator)
    layout = StepLayout.of(settings.training, world or World())
    engine = functools.partial(
        EngineSettings, training=settings.training, layout=layout, device=CPU
    )
    return TokenizerTask(
        engine=engine_type(tokenizer, engine(name="tokenizer")),
        discriminator_engine=engine_type(discriminator, engine(name="discriminator")),
        perceptual=build_perceptual_loss(settings.perceptual),
        teachers=teachers,
        losses=settings.losses,
        training=settings.training,
        evaluate_fn=lambda model: {"tokenizer/validation/training": float(model.training)},
    )


def build_autoregressive_task(
    config: RunConfig,
    world: World | None = None,
    *,
    engine_type: BuildEngine = PlainEngine,
    prepare: Callable[[torch.nn.Module], object] = lambda module: module,
) -> AutoregressiveTask:
    """Build the generator's task."""
    settings = config.autoregressive
    with keyed_torch_rng(settings.training.seed, "tiny generator", device=CPU):
        model = FactorizedTransformer(settings.model)
    prepare(model)
    groups = decay_groups(model, settings.training.optimizer.weight_decay)
    engine = EngineSettings(
        training=settings.training,
        name="autoregressive",
        layout=StepLayout.of(settings.training, world or World()),
        device=CPU,
        parameter_groups=[dict(group) for group in groups],
    )
    return AutoregressiveTask(
        engine=engine_type(model, engine),
        training=settings.training,
        codebook_names=[book.name for book in config.tokenizer.model.codebooks],
        evaluate_fn=lambda model: {"autoregressive/validation/training": float(model.training)},
    )


def draw_images(config: RunConfig, step: int, micro_batches: Sequence[int]) -> list[ImageBatch]:
    """Draw smooth images and teachers' features, keyed by step and micro-batch."""
    training, model = config.tokenizer.training, config.tokenizer.model
    size, count = model.image_size, training.micro_batch_size
    return [
        ImageBatch(
            images=_draw_smooth_images(count, size, torch_generator("images", step, index)),
            labels=torch.zeros(count, dtype=torch.int64),
            keys=[f"{step}-{index}-{row}" for row in range(count)],
            views=[0] * count,
            features=_draw_features(config, torch_generator("features", step, index)),
            micro_batch=index,
        )
        for index in micro_batches
    ]


def draw_codes(config: RunConfig, step: int, micro_batches: Sequence[int]) -> list[CodeBatch]:
    """Draw codes and labels, keyed by step and micro-batch."""
    training, model = config.autoregressive.training, config.autoregressive.model
    count, grid = training.micro_batch_size, model.grid_size
    batches: list[CodeBatch] = []
    for index in micro_batches:
        generator = torch_generator("codes", step, index)
        draw: Any = functools.partial(torch.randint, generator=generator)
        batches.append(
            CodeBatch(
                codes=draw(model.codebook_size, (count, model.num_codebooks, grid, grid)),
                labels=draw(model.num_classes, (count,)),
                keys=[f"{step}-{index}-{row}" for row in range(count)],
                views=[0] * count,
                micro_batch=index,
            )
        )
    return batches


def _draw_smooth_images(count: int, size: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth.to(torch.uint8)


def _draw_features(config: RunConfig, generator: torch.Generator) -> dict[str, Tensor]:
    count = config.tokenizer.training.micro_batch_size
    return {
        book.teacher: torch.randn(count, book.feature_dim or 0, generator=generator)
        for book in config.tokenizer.model.codebooks
        if book.teacher is not None
    }
