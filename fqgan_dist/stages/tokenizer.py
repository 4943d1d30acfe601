"""The `tokenizer` stage: train FQGAN, and load what it trained."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.data.decoding import to_float, to_uint8
from fqgan_dist.data.loader import ImageLoader, check_num_views
from fqgan_dist.errors import ConfigError
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.images import HeldOutImages
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.teachers import (
    FeatureIds,
    build_online_teachers,
    feature_store,
    stores_features,
)
from fqgan_dist.stages.tokenizer_task import STAGE, DiscriminatorPasses, TokenizerTask
from fqgan_dist.stages.training import (
    load_weights,
    training_settings,
)
from fqgan_dist.stages.training_plan import plan_tokenizer
from fqgan_dist.stages.training_stage import TrainedWeights, TrainingStage
from fqgan_dist.tokenizer.discriminator import PatchDiscriminator
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.tokenizer.perceptual import build_perceptual_loss
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.engines import build_engine
from fqgan_dist.training.step_layout import StepLayout
from fqgan_dist.training.trainer import TrainingResult
from fqgan_dist.weights.staging import load_initial_weights, resolve_weights


class TrainedTokenizer(TrainedWeights):
    """The trained tokenizer."""

    stage = STAGE


class TokenizerStage(TrainingStage):
    """Trains FQGAN."""

    output = TrainedTokenizer
    inputs = (DatasetIds,)
    optional_inputs = (FeatureIds,)

    @classmethod
    def training(cls, config: RunConfig) -> TrainingConfig:
        return config.tokenizer.training

    @classmethod
    def plan(cls, config: RunConfig) -> Mapping[str, Any]:
        return plan_tokenizer(config)

    @classmethod
    def find_problems(cls, config: RunConfig) -> Iterator[str]:
        data = config.data
        try:
            check_num_views(data.views, data.num_views, has_features=stores_features(config))
        except ConfigError as error:
            yield f"data.{error}"

    def settings(self) -> Mapping[str, Any]:
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
        datasets = self.context.read(DatasetIds)
        ids = {"train": datasets.train, "val": datasets.val}
        if self.context.config.teachers.networks:
            ids["features/fingerprint"] = self.context.read(FeatureIds).fingerprint
        return ids

    def build_task(self) -> TokenizerTask:
        # Weights depend on the seed only, or are `init_from`'s; the discriminator's are drawn.
        config = self.context.config.tokenizer
        training = config.training
        with keyed_torch_rng(training.seed, "tokenizer_weights", device=torch.device("cpu")):
            tokenizer = FactorizedTokenizer(config.model)
            discriminator = PatchDiscriminator(config.discriminator)
        load_initial_weights(tokenizer, config.init_from, field="tokenizer.init_from")
        layout = StepLayout.of(training, self.context.world)
        settings = functools.partial(
            EngineSettings, training=training, layout=layout, device=self.context.device
        )
        teachers = None
        if self.context.config.teachers.networks and not self.context.config.teachers.precompute:
            teachers = build_online_teachers(self.context)
        weights_path = resolve_weights(
            config.perceptual.weights, field="tokenizer.perceptual.weights"
        )
        perceptual = build_perceptual_loss(config.perceptual, weights_path=weights_path)
        val = HeldOutImages(self.context, training.evaluation_samples, training.micro_batch_size)
        return TokenizerTask(
            engine=build_engine(tokenizer, settings(name="tokenizer")),
            discriminator_engine=build_engine(
                DiscriminatorPasses(discriminator), settings(name="discriminator")
            ),
            perceptual=perceptual.to(self.context.device),
            teachers=teachers,
            losses=config.losses,
            training=training,
            evaluate_fn=val.measure_tokenizer,
        )

    def build_loader(self) -> ImageLoader:
        config = self.context.config
        training = config.tokenizer.training
        return ImageLoader(
            open_dataset(self.context, "train"),
            seed=config.data.seed,
            window_shards=config.data.window_shards,
            view=config.data.views,
            num_views=config.data.num_views,
            micro_batch_size=training.micro_batch_size,
            micro_batches_per_step=training.micro_batches_per_step,
            features=feature_store(self.context),
            loader_workers=config.data.loader_workers,
            max_damaged_in_a_row=config.data.damage_limit,
            cache=config.data.cache,
        )

    def summarize(self, result: TrainingResult) -> Mapping[str, Any]:
        return {
            f"{STAGE}/discriminator_loss": result.metrics.get(f"{STAGE}/loss/discriminator"),
            f"{STAGE}/training_usage": {
                book.name: result.metrics[f"{STAGE}/codebook_usage/{book.name}"]
                for book in self.context.config.tokenizer.model.codebooks
            },
        }


def load_tokenizer(context: RunContext) -> FactorizedTokenizer:
    """Load the finished tokenizer for inference: averaged weights if there are any, on the device.

    Raises:
        DataError: the stage has not finished.
        CheckpointError: the checkpoint is damaged or of another architecture.
    """
    config = context.config.tokenizer
    tokenizer = FactorizedTokenizer(config.model)
    step = context.read(TrainedTokenizer).step
    load_weights(tokenizer, context, STAGE, config.training, step)
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
