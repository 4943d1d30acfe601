"""The `samples` stage: codes drawn from the generator, chunk by chunk.

A sample is a function of its id and the seed; its codes are kept, as they take a few hundred bytes
and decode to the same image whenever one is wanted. A chunk is a range of sample ids.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.autoregressive.config import SamplesConfig
from fqgan_dist.autoregressive.sampling import draw_uniforms, generate_codes
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.randomness import numpy_generator
from fqgan_dist.stages.autoregressive import TrainedGenerator, load_model
from fqgan_dist.stages.id_ranges import IdRanges
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import RunContext, Stage, StageOutcome, StageOutput


class Samples(StageOutput):
    """The samples of a run."""

    stage = "samples"

    fingerprint: str


class SamplesStage(Stage):
    """Draws samples from the generator."""

    output = Samples
    inputs = (DatasetIds, TrainedGenerator)
    records = "one_per_inputs"
    can_be_taken = False

    def settings(self) -> Mapping[str, Any]:
        return self.context.config.samples.identity()

    def upstream(self) -> Mapping[str, Any]:
        return {
            "autoregressive": self.context.read(TrainedGenerator).weights,
            "train": self.context.read(DatasetIds).train,
        }

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        work = SampleWork(self.context)
        run_chunks(work)
        return StageOutcome(
            Samples(fingerprint=work.files.fingerprint),
            metrics={f"{self.name}/count": self.context.config.samples.count},
        )


class SampleWork(IdRanges):
    """Sampling; chunk c is the sample ids [c * chunk_size, (c + 1) * chunk_size)."""

    description = "samples"
    unit = "samples"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context.config.samples.count, context.config.samples.chunk_size)
        self.context = context
        self.num_classes = open_dataset(context, "train").index.num_classes
        self.files = sample_files(context)

    def is_done(self, chunk: int) -> bool:
        return self.files.exists(chunk)

    def process(self, chunk: int) -> None:
        ids = self.ids(chunk)
        settings = self.context.config.samples
        model = self.context.config.autoregressive.model
        labels = choose_labels(ids, settings, self.num_classes)
        uniforms = draw_uniforms(
            ids,
            seed=settings.seed,
            num_positions=model.num_positions,
            num_codebooks=model.num_codebooks,
        )
        device = self.context.device
        codes = generate_codes(
            self._model, labels.to(device), uniforms.to(device), settings.sampling
        )
        self.files.write(chunk, {"codes": codes.to(torch.int32).cpu(), "labels": labels})

    @functools.cached_property
    def _model(self) -> FactorizedTransformer:
        return load_model(self.context)


def choose_labels(ids: Sequence[int], settings: SamplesConfig, num_classes: int) -> Tensor:
    """Choose the classes of samples, (n,) int64; each depends on its own id alone."""
    match settings.labels:
        case "balanced":
            labels = [sample % num_classes for sample in ids]
        case "random":
            labels = [
                int(numpy_generator(settings.seed, "label", sample).integers(num_classes))
                for sample in ids
            ]
    return torch.tensor(labels, dtype=torch.int64)


def sample_files(context: RunContext) -> TensorFiles:
    """Open the chunks of samples of a run whose generator has finished."""
    identity = {
        "weights": context.read(TrainedGenerator).weights,
        "samples": context.config.samples.identity(),
        "num_classes": open_dataset(context, "train").index.num_classes,
    }
    return TensorFiles(context.storage, Samples.stage, fingerprint(identity))


def read_samples(files: TensorFiles, chunk: int) -> tuple[Tensor, Tensor]:
    """Read codes (n, K, h, w) and labels (n,), both int64."""
    tensors = files.read(chunk)
    return tensors["codes"].long(), tensors["labels"]
