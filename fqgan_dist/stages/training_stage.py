"""What the stages that train have in common."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fqgan_dist.chunks import RunChunks
from fqgan_dist.errors import ConfigError
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.stage import DataSizes, Stage, StageOutcome, StageOutput, all_stages
from fqgan_dist.stages.training import Loader, hash_weights, run_training
from fqgan_dist.stages.training_task import TrainingTask
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.step_layout import assign_slots
from fqgan_dist.training.trainer import TrainingResult
from fqgan_dist.world import World

logger = logging.getLogger(__name__)


class TrainedWeights(StageOutput):
    """What a training hands on."""

    step: int
    """Optimizer steps done; the checkpoint of this step holds the weights."""
    weights: str
    """Digest of the weights, equal for equal runs."""


class TrainingStage(Stage):
    """Base of the stages that train a task on the train workers; the output is `TrainedWeights`."""

    runs_in = "train_workers"
    growing = frozenset({"settings.training.steps"})

    @classmethod
    @abstractmethod
    def training(cls, config: RunConfig) -> TrainingConfig:
        """Return its settings that all trainings share."""

    @classmethod
    @abstractmethod
    def plan(cls, config: RunConfig) -> Mapping[str, Any]:
        """Return what `--dry-run` says of it: parameters, memory, steps; JSON-able."""

    @abstractmethod
    def build_task(self) -> TrainingTask[Any, Any]:
        """Build models, engines and losses."""

    @abstractmethod
    def build_loader(self) -> Loader[Any]:
        """Build what loads the training data."""

    @abstractmethod
    def summarize(self, result: TrainingResult) -> Mapping[str, Any]:
        """Choose the metrics of the summary."""

    @classmethod
    def find_rank_problems(cls, config: RunConfig, world_size: int) -> Iterator[str]:
        """Say whether a number of ranks cannot share a step."""
        training = cls.training(config)
        try:
            assign_slots(
                training.micro_batches_per_step,
                World(world_size=world_size),
                training.ranks_per_micro_batch,
            )
        except ConfigError as error:
            yield f"{cls.name}.{error}"

    @classmethod
    def find_size_problems(cls, config: RunConfig, sizes: Sequence[int]) -> Iterator[str]:
        """Say whether none of several numbers of ranks can share a step; of one, why not."""
        problems = [list(cls.find_rank_problems(config, size)) for size in sizes]
        if not all(problems):
            return
        if len(sizes) == 1:
            yield from problems[0]
            return
        training = cls.training(config)
        size = training.ranks_per_micro_batch
        yield (
            f"ray.train.num_workers: no number from {sizes[0]} to {sizes[-1]} is valid for the "
            f"{cls.name}; expected a multiple of {size} ({cls.name}.training."
            f"ranks_per_micro_batch) of at most {training.micro_batches_per_step * size} in it: "
            f"change the range, or how many ranks share a micro-batch"
        )

    @classmethod
    def find_data_problems(cls, config: RunConfig, sizes: DataSizes) -> Iterator[str]:
        """Find that an image would stand twice in a batch, a negative of itself in InfoNCE."""
        size = cls.training(config).global_batch_size
        if sizes.train_images < size:
            yield (
                f"{cls.name}.training.global_batch_size: {size} is more than the "
                f"{sizes.train_images} training images; lower it, or bring more images"
            )

    def has_output(self) -> bool:
        # A log of attempts alone is no checkpoint.
        names = self.context.storage.list(f"{self.name}/checkpoints")
        return any(name.startswith("step-") for name in names)

    def run(self, run_chunks: RunChunks) -> StageOutcome:  # noqa: ARG002  trains in place
        context = self.context
        training = self.training(context.config)
        self._warn_of_other_schedule(training)
        result = run_training(context, self.build_task(), self.build_loader())
        metrics = self.summarize(result)
        if not context.world.is_main:  # it writes no record, for which the checkpoint is read
            return StageOutcome(None, metrics)
        digest = hash_weights(context, self.name, training, result.step)
        output = self.output.model_validate({"step": result.step, "weights": digest})
        return StageOutcome(output, metrics)

    def _warn_of_other_schedule(self, training: TrainingConfig) -> None:
        # A longer training is not the one that it would have been from the start.
        record = self.load_record()
        if record is None or not record.history or training.schedule.kind == "constant":
            return
        lengths = [*record.history["settings.training.steps"], training.steps]
        logger.warning(
            "%s: trained over %s steps in turn with a %s schedule, which depends on their number: "
            "the result is not that of %d steps from the start, and its record says so",
            self.name,
            ", then ".join(map(str, lengths)),
            training.schedule.kind,
            training.steps,
        )


def find_trainings(config: RunConfig) -> dict[str, TrainingConfig]:
    """Return the training settings of all stages that train, named by the run or not."""
    return {
        stage.name: stage.training(config)
        for stage in all_stages()
        if issubclass(stage, TrainingStage)
    }
