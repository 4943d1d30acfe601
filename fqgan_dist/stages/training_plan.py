"""What a training stage would need: parameters, memory per GPU, steps.

The full-size models are built on the meta device: parameters and saved activations are exact, and
nothing is downloaded, trained or written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.data.batches import CodeBatch, ImageBatch
from fqgan_dist.stages.autoregressive_task import AutoregressiveTask
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.footprint import META, MeasuringEngine, imitated_gpu
from fqgan_dist.stages.model_states import (
    FP32_BYTES,
    chosen_zero_stage,
    compute_state_sizes,
    name_engine,
)
from fqgan_dist.stages.placement import valid_sizes
from fqgan_dist.stages.tokenizer_task import DiscriminatorPasses, TokenizerTask
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.perceptual import build_unfilled_perceptual_loss
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.world import World

Plan = dict[str, Any]
"""JSON-able."""

# Training images of ImageNet-1k, the paper's dataset.
IMAGENET_IMAGES = 1_281_167


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def plan_tokenizer(config: RunConfig) -> Plan:
    """Work out the tokenizer's training."""
    stage = config.tokenizer
    sizes = valid_sizes(config, stage.training)
    with META:
        tokenizer = FactorizedTokenizer(stage.model)
        discriminator = DiscriminatorPasses(PatchDiscriminator(stage.discriminator))
    perceptual = build_unfilled_perceptual_loss(stage.perceptual).to(META)
    engine = MeasuringEngine(tokenizer, others=[perceptual, discriminator])
    discriminator_engine = MeasuringEngine(discriminator)
    task = TokenizerTask(
        engine=engine,
        discriminator_engine=discriminator_engine,
        perceptual=perceptual,
        teachers=None,
        losses=stage.losses,
        training=_one_pass(stage.training),
        evaluate_fn=lambda _: {},
    )
    size, pixels = stage.training.images_per_pass, stage.model.image_size
    batch = ImageBatch(
        images=torch.empty(size, 3, pixels, pixels, dtype=torch.uint8, device=META),
        labels=torch.empty(size, dtype=torch.int64, device=META),
        keys=[],
        views=[],
        features={
            book.teacher: torch.empty(size, book.feature_dim or 0, device=META)
            for book in stage.model.codebooks
            if book.teacher
        },
        micro_batch=0,
    )
    with imitated_gpu(bf16=stage.training.precision == "bf16"):
        task.train_step([batch], stage.training.steps)  # the last step has a discriminator
    heads = count_parameters(tokenizer.feature_heads)
    counts = {
        "tokenizer": count_parameters(tokenizer),
        "tokenizer_without_feature_heads": count_parameters(tokenizer) - heads,
        "discriminator": count_parameters(discriminator),
        "perceptual_network": count_parameters(perceptual),
    }
    return {
        "parameters": counts,
        "training": plan_training(stage.training, sizes[-1]),
        "memory": _plan_memory(
            stage.training,
            sizes[0],  # the fewest have most each
            trained=counts["tokenizer"] + counts["discriminator"],
            averaged=counts["tokenizer"],
            frozen=counts["perceptual_network"],
            activations={
                "tokenizer_pass": engine.saved_bytes,
                "discriminator_pass": discriminator_engine.saved_bytes,
            },
            zero_stages=(1, 2),
        ),
    }


def plan_autoregressive(config: RunConfig) -> Plan:
    """Work out the generator's training."""
    stage = config.autoregressive
    sizes = valid_sizes(config, stage.training)
    with META:
        model = FactorizedTransformer(stage.model)
    engine = MeasuringEngine(model)
    task = AutoregressiveTask(
        engine=engine,
        training=_one_pass(stage.training),
        codebook_names=[book.name for book in config.tokenizer.model.codebooks],
        evaluate_fn=lambda _: {},
    )
    size, grid = stage.training.images_per_pass, stage.model.grid_size
    shape = (size, stage.model.num_codebooks, grid, grid)
    batch = CodeBatch(
        codes=torch.empty(shape, dtype=torch.int64, device=META),
        labels=torch.empty(size, dtype=torch.int64, device=META),
        keys=[],
        views=[],
        micro_batch=0,
    )
    with imitated_gpu(bf16=stage.training.precision == "bf16"):
        task.train_step([batch], stage.training.steps)
    total = count_parameters(model)
    counts = {
        "autoregressive": total,
        # The paper's 415M and 898M leave the aggregation layer out (fqgan.md 2.7).
        "autoregressive_without_aggregation": total - count_parameters(model.aggregation),
    }
    return {
        "parameters": counts,
        "training": plan_training(stage.training, sizes[-1]),
        "memory": _plan_memory(
            stage.training,
            sizes[0],  # the fewest have most each
            trained=total,
            averaged=total,
            frozen=0,
            activations={"pass": engine.saved_bytes},
            zero_stages=(1, 2, 3),
        ),
    }


def _one_pass(training: TrainingConfig) -> TrainingConfig:
    return training.model_copy(
        update={
            "global_batch_size": training.images_per_pass,
            "micro_batch_size": training.images_per_pass,
            "ranks_per_micro_batch": 1,
            # Autocast is imitated from outside: the meta device has none.
            "precision": "fp32",
        }
    )


def plan_training(training: TrainingConfig, ranks: int) -> Plan:
    """Count the steps, passes and images of a training on some ranks."""
    images_seen = training.steps * training.global_batch_size
    passes = training.gradient_accumulation_steps(World(world_size=ranks))
    groups = ranks // training.ranks_per_micro_batch
    return {
        "steps": training.steps,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
        "micro_batches_per_step": training.micro_batches_per_step,
        "largest_world_size": training.global_batch_size,
        "ranks": ranks,
        "ranks_per_micro_batch": training.ranks_per_micro_batch,
        "images_per_pass": training.images_per_pass,
        "passes_per_step": passes,
        "idle_passes_per_step": passes * groups - training.micro_batches_per_step,
        "precision": training.precision,
        "images_seen": images_seen,
        "epochs_of_imagenet": round(images_seen / IMAGENET_IMAGES, 2),
        "evaluations": -(-training.steps // training.evaluate_every),
        "checkpoints": -(-training.steps // training.checkpoint.every),
    }


def _plan_memory(
    training: TrainingConfig,
    ranks: int,
    *,
    trained: int,
    averaged: int,
    frozen: int,
    activations: dict[str, int],
    zero_stages: tuple[int, ...],
) -> Plan:
    """Give the bytes per GPU with the configured engine, and of the states with the others.

    Numbers are of parameters, `averaged` if the config asks for an average; `activations` are the
    bytes kept for the backward pass, by kind of pass.
    """
    averaged = averaged if training.ema_decay else 0
    zero_stage = chosen_zero_stage(training)
    sizes = compute_state_sizes(trained, zero_stage=zero_stage, ranks=ranks, averaged=averaged)
    # One process has nobody to share with: show what the most ranks of one GPU per micro-batch do.
    others = ranks if ranks > 1 else training.micro_batches_per_step
    states = {**vars(sizes), "total": sizes.total}
    return {
        "engine": {"name": training.engine, "zero_stage": zero_stage, "ranks": ranks},
        "states_bytes": states,
        "frozen_bytes": frozen * FP32_BYTES,
        "saved_activations_bytes": activations,
        "per_gpu_bytes": sizes.total + frozen * FP32_BYTES + max(activations.values()),
        "other_engines": {
            "ranks": others,
            "states_bytes": {
                name_engine(stage): compute_state_sizes(
                    trained, zero_stage=stage, ranks=others, averaged=averaged
                ).total
                for stage in (None, *zero_stages)
            },
        },
        "checkpoint_bytes": (3 * trained + averaged) * FP32_BYTES,
    }
