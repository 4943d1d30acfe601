"""The `samples` stage: codes drawn from the generator, chunk by chunk.

A sample is a function of its id and the seed; its codes are kept, as they take a few hundred bytes
and decode to the same image whenever one is wanted. A chunk is a range of sample ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.autoregressive.config import SamplesConfig
from fqgan_dist.autoregressive.sampling import draw_uniforms, generate_codes
from fqgan_dist.autoregressive.transformer import FactorizedTransformer
from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.randomness import numpy_generator
from fqgan_dist.stages.autoregressive import load_model
from fqgan_dist.stages.id_ranges import IdRanges
from fqgan_dist.stages.manifest import load_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.samples_export import EXPORT_FORMATS, ExportFormat, export_samples
from fqgan_dist.stages.stage import RunContext, StageOutcome

logger = logging.getLogger(__name__)

STAGE: StageName = "samples"


class SamplesStage:
    """Implements `fqgan_dist.stages.stage.Stage`."""

    name: StageName = STAGE

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def settings(self) -> Mapping[str, Any]:
        """What decides the samples, besides the generator."""
        return self.context.config.samples.identity()

    def upstream(self) -> Mapping[str, Any]:
        """Return the generator's weights, the dataset for its classes, and the exports."""
        return {
            "autoregressive": self.context.require("autoregressive").outputs["weights"],
            "train": self.context.require("shards").outputs["train"],
            "exports": dict.fromkeys(self._export_formats(), True),
        }

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        """Draw the samples that are missing, and export them where that is asked for."""
        work = SampleWork(self.context)
        run_chunks(work)
        exports = {
            name: export_samples(self.context, work.files, name, run_chunks)
            for name in self._export_formats()
        }
        for name, path in exports.items():
            logger.info("samples as %s: %s", name, self.context.storage.uri(path))
        return StageOutcome(
            outputs={"fingerprint": work.files.fingerprint, "exports": exports},
            metrics={f"{STAGE}/count": self.context.config.samples.count},
        )

    def _export_formats(self) -> list[ExportFormat]:
        """List the format that is asked for and those of the record.

        So asking for another one extends a finished stage, and asking for none changes nothing.
        """
        record = load_record(self.context.storage, STAGE)
        known = record.inputs if record else {}
        wanted = self.context.config.samples.export
        return [
            name for name in EXPORT_FORMATS if name == wanted or f"upstream.exports.{name}" in known
        ]


class SampleWork(IdRanges):
    """Sampling; chunk c is the sample ids [c * chunk_size, (c + 1) * chunk_size)."""

    description = "samples"
    unit = "samples"

    def __init__(self, context: RunContext) -> None:
        super().__init__(context.config.samples.count, context.config.samples.chunk_size)
        self.context = context
        self.num_classes = context.load_dataset("train").num_classes
        self.files = sample_files(context)

    def is_done(self, chunk: int) -> bool:
        """Whether the file is there; it is written whole or not at all."""
        return self.files.exists(chunk)

    def process(self, chunk: int) -> None:
        """Draw one range."""
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
        "weights": context.require("autoregressive").outputs["weights"],
        "samples": context.config.samples.identity(),
        "num_classes": context.load_dataset("train").num_classes,
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return TensorFiles(context.storage, STAGE, fingerprint)


def read_samples(files: TensorFiles, chunk: int) -> tuple[Tensor, Tensor]:
    """Read codes (n, K, h, w) and labels (n,), both int64."""
    tensors = files.read(chunk)
    return tensors["codes"].long(), tensors["labels"]
