"""The `tokenizer` stage: train FQGAN, and load what it trained."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.decoding import to_float, to_uint8
from fqgan_dist.data.loader import ImageBatch, ImageLoader
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.stages.images import HeldOutImages
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.stage import RunContext, StageOutcome
from fqgan_dist.stages.teachers import build_online_teachers, feature_store
from fqgan_dist.stages.tokenizer_task import STAGE, DiscriminatorPasses, TokenizerTask
from fqgan_dist.stages.training import (
    load_weights,
    run_training,
    trained_outputs,
    training_settings,
)
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.perceptual import build_perceptual_loss
from fqgan_dist.training.engines import build_engine
from fqgan_dist.weights.staging import load_initial_weights, resolve_weights


class TokenizerStage:
    """Implements `fqgan_dist.stages.stage.Stage`."""

    name: StageName = STAGE

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def settings(self) -> Mapping[str, Any]:
        """Everything that moves a weight."""
        config = self.context.config
        stage = config.tokenizer
        return {
            "model": stage.model.model_dump(mode="json"),
            "discriminator": stage.discriminator.model_dump(mode="json"),
            "perceptual": stage.perceptual.identity(stage.training.seed),
            "losses": stage.losses.model_dump(mode="json"),
            "training": training_settings(stage.training),
            "views": config.data.views.model_dump(mode="json"),
            **stage.initial_settings(),
            "num_views": config.data.num_views,
            "window_shards": config.data.window_shards,
            "data_seed": config.data.seed,
        }

    def upstream(self) -> Mapping[str, Any]:
        """Return the datasets and the teachers' features."""
        shards = self.context.require("shards").outputs
        ids = {"train": shards["train"], "val": shards["val"]}
        if self.context.config.teachers.networks:
            teachers = self.context.require("teachers").outputs
            ids |= {f"features/{name}": value for name, value in teachers.items()}
        return ids

    def run(self, run_chunks: RunChunks) -> StageOutcome:  # noqa: ARG002  trains in place
        """Train to the last step."""
        context = self.context
        task = build_tokenizer_task(context)
        loader = build_image_loader(context)

        def batches(first_step: int) -> Generator[Sequence[ImageBatch], None, None]:
            micro_batches = [slot.micro_batch for slot in task.slots]
            return loader.batches(first_step, micro_batches, loss_group=task.loss_group)

        training = context.config.tokenizer.training
        result = run_training(context, STAGE, task, batches, loader.take_report, training)
        metrics = {
            f"{STAGE}/discriminator_loss": result.metrics.get(f"{STAGE}/loss/discriminator"),
            f"{STAGE}/training_usage": {
                book.name: result.metrics[f"{STAGE}/codebook_usage/{book.name}"]
                for book in context.config.tokenizer.model.codebooks
            },
        }
        return StageOutcome(outputs=trained_outputs(context, STAGE, result), metrics=metrics)


def build_tokenizer_task(context: RunContext) -> TokenizerTask:
    """Build models, engines and losses of a run.

    Initial weights depend on the seed only, or are those of `init_from`; the discriminator's are
    always drawn.
    """
    config = context.config.tokenizer
    training = config.training
    with keyed_torch_rng(training.seed, "tokenizer_weights", device=torch.device("cpu")):
        tokenizer = FactorizedTokenizer(config.model)
        discriminator = PatchDiscriminator(config.discriminator)
    load_initial_weights(tokenizer, config.init_from, field="tokenizer.init_from")
    build = functools.partial(
        build_engine, training=training, world=context.world, device=context.device
    )
    teachers = None
    if context.config.teachers.networks and not context.config.teachers.precompute:
        teachers = build_online_teachers(context)
    weights_path = resolve_weights(config.perceptual.weights, field="tokenizer.perceptual.weights")
    perceptual = build_perceptual_loss(config.perceptual, weights_path=weights_path)
    val = HeldOutImages(context, training.evaluation_samples, training.micro_batch_size)
    return TokenizerTask(
        engine=build(tokenizer, name="tokenizer"),
        discriminator_engine=build(DiscriminatorPasses(discriminator), name="discriminator"),
        perceptual=perceptual.to(context.device),
        teachers=teachers,
        losses=config.losses,
        training=training,
        evaluate_fn=val.measure_tokenizer,
    )


def build_image_loader(context: RunContext) -> ImageLoader:
    """Build the loader of the training images, with the stored features if there are any."""
    config = context.config
    training = config.tokenizer.training
    return ImageLoader(
        context.storage,
        context.dataset_prefix("train"),
        seed=config.data.seed,
        window_shards=config.data.window_shards,
        view=config.data.views,
        num_views=config.data.num_views,
        micro_batch_size=training.micro_batch_size,
        micro_batches_per_step=training.micro_batches_per_step,
        features=feature_store(context),
        loader_workers=config.data.loader_workers,
        max_damaged_in_a_row=config.data.damage_limit,
        cache=config.data.cache,
        dataset_id=context.require("shards").outputs["train"],
    )


def load_tokenizer(context: RunContext) -> FactorizedTokenizer:
    """Load the finished tokenizer for inference: averaged weights if there are any, on the device.

    Raises:
        DataError: the stage has not finished.
        CheckpointError: the checkpoint is damaged or of another architecture.
    """
    config = context.config.tokenizer
    tokenizer = FactorizedTokenizer(config.model)
    load_weights(tokenizer, context, STAGE, config.training)
    return tokenizer.to(context.device).eval().requires_grad_(False)


@torch.inference_mode()
def encode_images(tokenizer: FactorizedTokenizer, images: Tensor, device: torch.device) -> Tensor:
    """Encode uint8 images (B, 3, H, W) to codes (B, K, h, w) on the CPU."""
    return tokenizer.encode_codes(to_float(images.to(device))).cpu()


@torch.inference_mode()
def decode_in_batches(
    tokenizer: FactorizedTokenizer,
    codes: Tensor,
    device: torch.device,
    batch_size: int,
    keep: Sequence[int] | None = None,
) -> Tensor:
    """Decode codes (n, K, h, w) to uint8 images (n, 3, H, W) on the CPU."""
    return torch.cat(
        [
            to_uint8(tokenizer.decode_codes(batch.to(device), keep=keep)).cpu()
            for batch in codes.split(batch_size)
        ]
    )
