"""The `evaluation` stage: what the tokenizer and the generator are worth (fqgan.md section 3).

Three pieces of chunked work store Inception features and per-image scores; a last step folds them
in chunk order, so the numbers are equal to the bit for any number of processes and any restart.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.evaluation.codebook_usage import CodeHistogram
from fqgan_dist.evaluation.inception_score import compute_inception_score
from fqgan_dist.evaluation.moments import Moments, compute_moments, fold_ordered
from fqgan_dist.evaluation.precision_recall import compute_precision_recall
from fqgan_dist.evaluation.reference import FidKind, FidScore, ReferenceStatistics, compute_fid
from fqgan_dist.stages.evaluation_work import (
    EvaluationModels,
    ImageWork,
    ReconstructionWork,
    ReferenceWork,
    SampleFeatureWork,
    build_figures,
)
from fqgan_dist.stages.manifest import load_record
from fqgan_dist.stages.names import StageName
from fqgan_dist.stages.stage import RunChunks, RunContext, StageOutcome

logger = logging.getLogger(__name__)

STAGE: StageName = "evaluation"
MANIFOLD_REFERENCE_IMAGES = 10_000
"""Training images that precision and recall see at most, as ADM's (fqgan.md 3.1): their cost is
quadratic."""


class EvaluationStage:
    """Implements `fqgan_dist.stages.stage.Stage`."""

    name: StageName = STAGE

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def settings(self) -> Mapping[str, Any]:
        """What decides the scores, besides images and weights."""
        return self.context.config.evaluation.model_dump(mode="json")

    def upstream(self) -> Mapping[str, Any]:
        """Return the images, the tokenizer and, where there are any, the samples."""
        shards = self.context.require("shards").outputs
        samples = load_record(self.context.storage, "samples")
        has_samples = samples is not None and samples.state == "done"
        return {
            "train": shards["train"],
            "val": shards["val"],
            "tokenizer": self.context.require("tokenizer").outputs["weights"],
            # A tokenizer is judged without a generator; samples that come later extend the stage.
            "samples": samples.outputs["fingerprint"] if samples and has_samples else None,
        }

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        """Compute what is missing, then fold."""
        models = EvaluationModels(self.context)
        reconstruction = ReconstructionWork(self.context, models)
        run_chunks(reconstruction)
        metrics = self._judge_reconstructions(reconstruction)
        has_samples = self.upstream()["samples"] is not None
        if has_samples:
            reference = ReferenceWork(self.context, models)
            samples = SampleFeatureWork(self.context, models)
            for work in (reference, samples):
                run_chunks(work)
            metrics |= self._judge_samples(reference, samples)
        if self.context.world.is_main:
            build_figures(self.context, models.tokenizer, with_samples=has_samples)
        return StageOutcome(metrics=metrics)

    def _judge_reconstructions(self, work: ReconstructionWork) -> dict[str, Any]:
        """Score reconstructions against the same centre-cropped validation images."""
        context = self.context
        chunks = [work.files.read(chunk) for chunk in work.chunks()]
        model = context.config.tokenizer.model
        histogram = CodeHistogram(model.num_codebooks, model.codebook_size)
        for chunk in chunks:
            histogram.update(chunk["codes"].long())
        names = [book.name for book in model.codebooks]
        fid = self._compute_fid(
            "rfid", (work, "reconstruction_features"), (work, "original_features"), "val"
        )
        results: dict[str, Any] = {
            "psnr": _mean(chunks, "psnr"),
            "psnr_mean_image": _mean(chunks, "psnr_mean_image"),
            "ssim": _mean(chunks, "ssim"),
            "rfid": fid.value,
            "rfid_evaluator": fid.evaluator_id,
            "rfid_reference": fid.reference_id,
            "inception_score": _score(chunks, "reconstruction_logits"),
            "usage": _by_name(names, histogram.usage),
            "perplexity": _by_name(names, histogram.perplexity),
            "codebook_size": model.codebook_size,
            "images": fid.num_samples,
        }
        semantic = [book.name for book in model.codebooks if book.teacher]
        # Groups of the training micro-batch's size: InfoNCE depends on the number of negatives.
        size = context.config.tokenizer.training.micro_batch_size
        if semantic and work.count < size:
            logger.warning("%d validation images: too few for InfoNCE of %d", work.count, size)
        elif semantic:
            results["info_nce_chance"] = math.log(size)
            results["info_nce"] = {
                name: float(torch.cat([chunk[f"info_nce/{name}"] for chunk in chunks]).mean())
                for name in semantic
            }
        self._write("reconstruction", results, fid, work)
        return {f"tokenizer/{name}": value for name, value in results.items()}

    def _judge_samples(self, reference: ReferenceWork, work: SampleFeatureWork) -> dict[str, Any]:
        """Score samples against the training images' statistics."""
        fid = self._compute_fid("gfid", (work, "features"), (reference, "features"), "train")
        chunks = [work.files.read(chunk) for chunk in work.chunks()]
        nearest = _read_first(reference, "features", MANIFOLD_REFERENCE_IMAGES)
        quality = compute_precision_recall(
            nearest, torch.cat([chunk["features"] for chunk in chunks])
        )
        results: dict[str, Any] = {
            "gfid": fid.value,
            "gfid_evaluator": fid.evaluator_id,
            "gfid_reference": fid.reference_id,
            "inception_score": _score(chunks, "logits"),
            "precision": quality.precision,
            "recall": quality.recall,
            "precision_recall_reference_images": len(nearest),
            "images": fid.num_samples,
            "reference_images": fid.num_reference_samples,
        }
        self._write("samples", results, fid, work)
        return {f"samples/{name}": value for name, value in results.items()}

    def _compute_fid(
        self,
        kind: FidKind,
        samples: tuple[ImageWork, str],
        reference: tuple[ImageWork, str],
        split: str,
    ) -> FidScore:
        """Compare two feature sets; the reference is the centre crops of a split."""
        statistics = ReferenceStatistics(
            kind=kind,
            reference_id=f"{split}:{self.context.require('shards').outputs[split]}",
            evaluator_id=reference[0].evaluator_id,
            moments=_fold(*reference),
        )
        return compute_fid(
            _fold(*samples), statistics, kind=kind, evaluator_id=samples[0].evaluator_id
        )

    def _write(self, name: str, results: Mapping[str, Any], fid: FidScore, work: ImageWork) -> None:
        """Write `evaluation/<name>.json`: the numbers with what they are to be compared by."""
        if not self.context.world.is_main:
            return
        document = {
            "evaluator": fid.evaluator_id,
            "reference": fid.reference_id,
            "reference_images": fid.num_reference_samples,
            "tokenizer_weights": self.context.require("tokenizer").outputs["weights"],
            "fingerprint": work.files.fingerprint,
            "results": results,
        }
        data = json.dumps(document, indent=1, sort_keys=True).encode()
        self.context.storage.write_bytes(f"{STAGE}/{name}.json", data)


def _fold(work: ImageWork, name: str) -> Moments:
    """Fold the moments of one feature set in chunk order."""
    return fold_ordered(compute_moments(work.files.read(chunk)[name]) for chunk in work.chunks())


def _read_first(work: ImageWork, name: str, count: int) -> Tensor:
    """Read a tensor of the first `count` images; shards are class-mixed, so they are a fair few."""
    parts: list[Tensor] = []
    for chunk in work.chunks():
        parts.append(work.files.read(chunk)[name])
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]


def _mean(chunks: list[dict[str, Tensor]], name: str) -> float:
    return float(torch.cat([chunk[name] for chunk in chunks]).double().mean())


def _score(chunks: list[dict[str, Tensor]], name: str) -> float:
    return compute_inception_score(torch.cat([chunk[name] for chunk in chunks])).mean


def _by_name(names: list[str], values: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
