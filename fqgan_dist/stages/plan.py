"""What a run would do and need, worked out from its config alone (`fqgan run CONFIG --dry-run`).

The full-size models are built on the meta device: parameters and saved activations are exact, and
nothing is downloaded, trained or written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.data.batches import CodeBatch, ImageBatch
from fqgan_dist.data.storage import Storage
from fqgan_dist.stages.autoregressive_task import AutoregressiveTask
from fqgan_dist.stages.codes import count_code_views
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.footprint import META, MeasuringEngine, imitated_gpu
from fqgan_dist.stages.manifest import load_record
from fqgan_dist.stages.names import STAGE_NAMES
from fqgan_dist.stages.preflight import check_settings, find_missing_files
from fqgan_dist.stages.tokenizer_task import DiscriminatorPasses, TokenizerTask
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.perceptual import build_unfilled_perceptual_loss
from fqgan_dist.training.config import TrainingConfig

Plan = dict[str, Any]
"""JSON-able."""

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k, the paper's dataset."""
_FP32_BYTES = 4
_HALF_BYTES = 2
"""Of a float16 feature value and of a uint16 code."""


def plan_run(config: RunConfig) -> Plan:
    """Work out sizes, memory, steps and placement of a run.

    Raises:
        ConfigError: settings that only show their conflict when models or stores are built.
    """
    check_settings(config)
    num_images, images_source = _count_images(config)
    return {
        "name": config.name,
        "storage_root": config.storage.root,
        "stages": [name for name in STAGE_NAMES if name in config.stages],
        "placement": _place(config),
        "dataset": {"training_images": num_images, "known_from": images_source},
        "tokenizer": _plan_tokenizer(config),
        "autoregressive": _plan_autoregressive(config),
        "stored": _plan_stored(config, num_images),
        "notes": _collect_notes(config),
    }


def count_parameters(module: nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _plan_tokenizer(config: RunConfig) -> Plan:
    stage = config.tokenizer
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
        training=_one_micro_batch(stage.training),
        evaluate_fn=lambda _: {},
    )
    size, pixels = stage.training.micro_batch_size, stage.model.image_size
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
    trained = counts["tokenizer"] + counts["discriminator"]
    return {
        "parameters": counts,
        "training": _plan_training(stage.training),
        "memory": {
            **_model_states(stage.training, trained, averaged=counts["tokenizer"]),
            "frozen_bytes": counts["perceptual_network"] * _FP32_BYTES,
            "saved_activations_bytes": {
                "tokenizer_pass": engine.saved_bytes,
                "discriminator_pass": discriminator_engine.saved_bytes,
            },
        },
    }


def _plan_autoregressive(config: RunConfig) -> Plan:
    stage = config.autoregressive
    with META:
        model = FactorizedTransformer(stage.model)
    engine = MeasuringEngine(model)
    task = AutoregressiveTask(
        engine=engine,
        training=_one_micro_batch(stage.training),
        codebook_names=[book.name for book in config.tokenizer.model.codebooks],
        evaluate_fn=lambda _: {},
    )
    size, grid = stage.training.micro_batch_size, stage.model.grid_size
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
        "training": _plan_training(stage.training),
        "memory": {
            **_model_states(stage.training, total, averaged=total),
            "frozen_bytes": 0,
            "saved_activations_bytes": {"pass": engine.saved_bytes},
        },
    }


def _one_micro_batch(training: TrainingConfig) -> TrainingConfig:
    # Autocast is imitated from outside: the meta device has none.
    return training.model_copy(
        update={"global_batch_size": training.micro_batch_size, "precision": "fp32"}
    )


def _plan_training(training: TrainingConfig) -> Plan:
    images_seen = training.steps * training.global_batch_size
    return {
        "steps": training.steps,
        "global_batch_size": training.global_batch_size,
        "micro_batch_size": training.micro_batch_size,
        "micro_batches_per_step": training.micro_batches_per_step,
        "largest_world_size": training.micro_batches_per_step,
        "precision": training.precision,
        "images_seen": images_seen,
        "epochs_of_imagenet": round(images_seen / IMAGENET_IMAGES, 2),
        "evaluations": -(-training.steps // training.evaluate_every),
        "checkpoints": -(-training.steps // training.checkpoint.every),
    }


def _model_states(training: TrainingConfig, parameters: int, *, averaged: int) -> Plan:
    """Give the bytes per GPU of what a training keeps besides activations, all fp32.

    ZeRO-1 gives each of N ranks the moments of 1/N of the parameters, with a copy of these to
    update; parameters and gradients are whole on every rank.
    """
    whole = parameters * _FP32_BYTES
    ema = averaged * _FP32_BYTES if training.ema_decay else 0
    ranks = training.micro_batches_per_step
    plain = {"parameters": whole, "gradients": whole, "adam_moments": 2 * whole, "ema": ema}
    zero = {
        "parameters": whole,
        "gradients": whole,
        "adam_moments": -(-2 * whole // ranks),
        "parameter_partition": -(-whole // ranks),
        "ema": ema,
    }
    return {
        "plain_bytes": plain | {"total": sum(plain.values())},
        "zero1_ranks": ranks,
        "zero1_bytes": zero | {"total": sum(zero.values())},
        "checkpoint_bytes": 3 * whole + ema,
    }


def _plan_stored(config: RunConfig, num_images: int) -> Plan:
    model = config.tokenizer.model
    features = 0
    if config.teachers.networks and config.teachers.precompute:
        values = sum(book.feature_dim or 0 for book in model.codebooks)
        features = num_images * (config.data.num_views or 0) * values * _HALF_BYTES
    crops = count_code_views(config.codes.views)
    codes_per_crop = model.num_codebooks * model.num_positions * _HALF_BYTES
    return {
        "feature_views": config.data.num_views if features else 0,
        "features_bytes": features,
        "code_crops": crops,
        "codes_bytes": num_images * crops * codes_per_crop,
    }


def _count_images(config: RunConfig) -> tuple[int, str]:
    """Return the number of training images, and how it is known."""
    storage = Storage(config.storage.root)
    # Only on a disk: a dry run asks nothing of a network.
    record = load_record(storage, "shards") if storage.is_local else None
    if record is not None and record.state == "done":
        return int(record.metrics["shards/train_images"]), "the run's shards"
    return IMAGENET_IMAGES, "assumed: ImageNet-1k; the shards are not written yet"


def _place(config: RunConfig) -> Plan:
    match config.execution:
        case "local":
            return {
                "execution": "local",
                "processes": 1,
                "device": config.device,
                "description": "every stage in this process, one after the other; a step runs its "
                "micro-batches in turn",
            }


def _collect_notes(config: RunConfig) -> list[str]:
    notes = [
        "Activations are those kept for one micro-batch's backward pass; temporaries, workspaces "
        "and fragmentation come on top."
    ]
    named = {teacher.name: teacher.weights.source for teacher in config.teachers.networks}
    named |= {
        "LPIPS": config.tokenizer.perceptual.weights,
        "Inception": config.evaluation.inception.weights.source,
    }
    random = [name for name, source in named.items() if source == "random"]
    if random:
        notes.append(
            f"Random weights: {', '.join(random)}; scores are not comparable with published ones."
        )
    if config.teachers.networks and not config.teachers.precompute:
        notes.append("The teachers run in the training step; their memory is not counted.")
    if config.tokenizer.losses.discriminator_start_step > config.tokenizer.training.steps:
        notes.append("The discriminator never starts: its start step is after the last step.")
    notes += [f"Not here yet: {problem}." for _, problem in find_missing_files(config)]
    return notes
