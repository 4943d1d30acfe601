"""The `autoregressive` stage: train FAR on codes, and load what it trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.autoregressive.losses import compute_code_losses
from fqgan_dist.autoregressive.optimization import decay_groups
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.data.loader import CodeLoader
from fqgan_dist.evaluation.codebook_usage import CodeHistogram
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.stages.autoregressive_task import STAGE, AutoregressiveTask
from fqgan_dist.stages.codes import CodeIds, code_store, read_all_codes
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import DataSizes, RunContext
from fqgan_dist.stages.training import load_weights, training_settings
from fqgan_dist.stages.training_plan import plan_autoregressive
from fqgan_dist.stages.training_stage import TrainedWeights, TrainingStage
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.engines import build_engine
from fqgan_dist.training.step_layout import StepLayout
from fqgan_dist.training.trainer import TrainingResult
from fqgan_dist.weights.staging import load_initial_weights


class TrainedGenerator(TrainedWeights):
    """The trained generator."""

    stage = STAGE


class AutoregressiveStage(TrainingStage):
    """Trains FAR."""

    output = TrainedGenerator
    inputs = (DatasetIds, CodeIds)

    @classmethod
    def training(cls, config: RunConfig) -> TrainingConfig:
        return config.autoregressive.training

    @classmethod
    def plan(cls, config: RunConfig) -> Mapping[str, Any]:
        return plan_autoregressive(config)

    @classmethod
    def find_data_problems(cls, config: RunConfig, sizes: DataSizes) -> Iterator[str]:
        yield from super().find_data_problems(config, sizes)
        num_classes = config.autoregressive.model.num_classes
        if sizes.num_classes > num_classes:
            yield (
                f"autoregressive.model.num_classes: {num_classes} is less than the "
                f"{sizes.num_classes} classes of the images; raise it"
            )
        if not sizes.val_has_classes:
            yield (
                "data.validation_source: its images have no classes, but the generator's validation"
                " loss is that of images with classes; name others, or leave stage 'autoregressive'"
                " and those behind it out of stages"
            )

    def settings(self) -> Mapping[str, Any]:
        stage = self.context.config.autoregressive
        return {
            "model": stage.model.model_dump(mode="json"),
            **stage.initial_settings(),
            "training": training_settings(stage.training),
            "window_shards": self.context.config.data.window_shards,
            "data_seed": self.context.config.data.seed,
        }

    def upstream(self) -> Mapping[str, Any]:
        return {"codes": self.context.read(CodeIds).model_dump()}

    def build_task(self) -> AutoregressiveTask:
        # Initial weights depend on the seed only, or are those of `init_from`.
        config = self.context.config.autoregressive
        with keyed_torch_rng(config.training.seed, "model_weights", device=torch.device("cpu")):
            model = FactorizedTransformer(config.model)
        load_initial_weights(model, config.init_from, field="autoregressive.init_from")
        groups = decay_groups(model, config.training.optimizer.weight_decay)
        settings = EngineSettings(
            training=config.training,
            name=STAGE,
            layout=StepLayout.of(config.training, self.context.world),
            device=self.context.device,
            parameter_groups=[dict(group) for group in groups],
        )
        return AutoregressiveTask(
            engine=build_engine(model, settings),
            training=config.training,
            codebook_names=[book.name for book in self.context.config.tokenizer.model.codebooks],
            evaluate_fn=HeldOutCodes(self.context).measure_model,
        )

    def build_loader(self) -> CodeLoader:
        config, training = self.context.config, self.context.config.autoregressive.training
        return CodeLoader(
            open_dataset(self.context, "train"),
            codes=code_store(self.context, "train"),
            seed=config.data.seed,
            micro_batch_size=training.micro_batch_size,
            micro_batches_per_step=training.micro_batches_per_step,
            window_shards=config.data.window_shards,
            loader_workers=config.data.loader_workers,
            max_damaged_in_a_row=config.data.damage_limit,
        )

    def summarize(self, result: TrainingResult) -> Mapping[str, Any]:
        return {
            f"{STAGE}/{name.removeprefix(f'{STAGE}/validation/')}": value
            for name, value in result.metrics.items()
            if name.startswith(f"{STAGE}/validation/")
        }


def load_model(context: RunContext) -> FactorizedTransformer:
    """Load the finished generator for inference: averaged weights if there are any, on the device.

    Raises what `load_tokenizer` does.
    """
    config = context.config.autoregressive
    model = FactorizedTransformer(config.model)
    step = context.read(TrainedGenerator).step
    load_weights(model, context, STAGE, config.training, step)
    return model.to(context.device).eval().requires_grad_(False)


class HeldOutCodes:
    """The first validation codes, kept in memory, to measure a model on."""

    def __init__(self, context: RunContext) -> None:
        training = context.config.autoregressive.training
        dataset = open_dataset(context, "val")
        count = min(training.evaluation_samples, dataset.index.num_samples)
        self.context = context
        self.codes, self.labels = read_all_codes(context, "val", dataset, count)
        self.batch_size = training.micro_batch_size
        model = context.config.autoregressive.model
        histogram = CodeHistogram(model.num_codebooks, model.codebook_size)
        histogram.update(self.codes)
        # What a model that knows nothing but how often each code occurs could reach.
        self.unigram_entropy = float(histogram.unigram_entropy.mean())

    @torch.inference_mode()
    def measure_model(self, model: FactorizedTransformer) -> dict[str, float]:
        """Compute the teacher-forced loss, nats per code; every rank computes all of it."""
        device = self.context.device
        total = torch.zeros((), dtype=torch.float64)
        for codes, labels in zip(
            self.codes.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            ACTIVITY.move()
            losses = compute_code_losses(
                model(codes.to(device), labels.to(device)), codes.to(device)
            )
            total += losses.double().mean().cpu() * len(codes)
        loss = float(total) / len(self.codes)
        return {
            f"{STAGE}/validation/validation_loss": loss,
            f"{STAGE}/validation/unigram_entropy": self.unigram_entropy,
            f"{STAGE}/validation/loss_over_unigram_entropy": loss / self.unigram_entropy,
        }
