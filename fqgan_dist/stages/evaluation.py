"""The `evaluation` stage: what the tokenizer and the generator are worth (fqgan.md section 3).

Three pieces of chunked work store Inception features and per-image scores; a last step folds them
in chunk order, so the numbers are equal to the bit for any number of processes and any restart.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fqgan_dist.chunks import RunChunks
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.codebook_usage import CodeHistogram
from fqgan_dist.evaluation.inception_score import compute_inception_score
from fqgan_dist.evaluation.moments import (
    LEAST_FID_IMAGES,
    Moments,
    compute_moments,
    fold_ordered,
)
from fqgan_dist.evaluation.precision_recall import NUM_NEIGHBOURS, compute_precision_recall
from fqgan_dist.evaluation.reconstruction import SSIM_WINDOW
from fqgan_dist.evaluation.reference import FidKind, FidScore, ReferenceStatistics, compute_fid
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages.adm_reference import describe_missing, hash_adm_reference, load_adm_reference
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.damage import publish_damage
from fqgan_dist.stages.evaluation_work import (
    MANIFOLD_REFERENCE_IMAGES,
    EvaluationModels,
    ImageWork,
    ReconstructionWork,
    ReferenceWork,
    SampleFeatureWork,
    build_figures,
)
from fqgan_dist.stages.samples import Samples
from fqgan_dist.stages.shards import DatasetIds
from fqgan_dist.stages.stage import (
    DataSizes,
    RunContext,
    Stage,
    StageOutcome,
    StageOutput,
)
from fqgan_dist.stages.tokenizer import TrainedTokenizer
from fqgan_dist.weights.staging import is_missing

logger = logging.getLogger(__name__)

# Where runs that were begun when evaluation had one record keep its figures.
FORMER_FIGURES = "evaluation/figures"


_NEEDED = (
    f"precision and recall of samples need at least {NUM_NEIGHBOURS + 1} on each side: take more, "
    "or leave 'evaluation' out of stages"
)


class Evaluated(StageOutput):
    """What the evaluation of a run leaves beside its metrics."""

    stage = "evaluation"

    figures: str = FORMER_FIGURES
    """Folder of the images of the report, below the storage root."""


class EvaluationStage(Stage):
    """Judges reconstructions and samples."""

    output = Evaluated
    inputs = (DatasetIds, TrainedTokenizer)
    optional_inputs = (Samples,)
    records = "one_per_inputs"
    can_be_taken = False

    @classmethod
    def find_missing_files(cls, config: RunConfig) -> Iterator[str]:
        reference = config.evaluation.adm_reference
        if reference is not None and is_missing(reference):
            yield describe_missing(reference)

    @classmethod
    def find_problems(cls, config: RunConfig) -> Iterator[str]:
        if cls.name not in config.stages:
            return
        counts = {"samples.count": config.samples.count} if Samples.stage in config.stages else {}
        if config.evaluation.reference_samples is not None:
            counts["evaluation.reference_samples"] = config.evaluation.reference_samples
        for field, count in counts.items():
            if count <= NUM_NEIGHBOURS:
                yield f"{field}: {count} is too few; {_NEEDED}"
        size = config.tokenizer.model.image_size
        if size < SSIM_WINDOW:
            yield (
                f"tokenizer.model.image_size: {size} is less than the {SSIM_WINDOW} pixels of the "
                f"window of SSIM; raise it, or leave {cls.name!r} out of stages"
            )

    @classmethod
    def find_data_problems(cls, config: RunConfig, sizes: DataSizes) -> Iterator[str]:
        if sizes.val_images < LEAST_FID_IMAGES:
            yield (
                f"data.validation_source: {sizes.val_images} validation image is too few; rFID "
                f"needs at least {LEAST_FID_IMAGES}: bring more, or leave {cls.name!r} out of "
                "stages"
            )
        if Samples.stage in config.stages and sizes.train_images <= NUM_NEIGHBOURS:
            yield f"data.source: {sizes.train_images} training images are too few; {_NEEDED}"

    def settings(self) -> Mapping[str, Any]:
        # ADM's reference file counts by its content, which is upstream: it may be moved. Whoever
        # asks for this stage's record reads it, as the content is part of the record's name.
        evaluation = self.context.config.evaluation
        return {
            **evaluation.identity(),
            "has_adm_reference": evaluation.adm_reference is not None,
        }

    def upstream(self) -> Mapping[str, Any]:
        """See `Stage`; besides, a ConfigError where ADM's reference file is named and not there."""
        datasets, samples = self.context.read(DatasetIds), self.context.find(Samples)
        return {
            "train": datasets.train,
            "val": datasets.val,
            "tokenizer": self.context.read(TrainedTokenizer).weights,
            # A tokenizer is judged without a generator, too.
            "samples": samples.fingerprint if samples else None,
            "adm_reference": self._adm_sha256,
        }

    def run(self, run_chunks: RunChunks) -> StageOutcome:
        models = EvaluationModels(self.context)
        has_samples = self.context.find(Samples) is not None
        # Before the features, which take hours: a wrong file is known at once.
        adm = self._load_adm_reference(models) if has_samples else None
        reconstruction = ReconstructionWork(self.context, models)
        run_chunks(reconstruction)
        metrics = self._judge_reconstructions(reconstruction)
        damaged = reconstruction.notes.read(reconstruction.chunks())
        if has_samples:
            reference = ReferenceWork(self.context, models)
            samples = SampleFeatureWork(self.context, models)
            for work in (reference, samples):
                run_chunks(work)
            metrics |= self._judge_samples(reference, samples, adm)
            damaged += reference.notes.read(reference.chunks())
        publish_damage(self.context, self.name, damaged)
        if not self.context.world.is_main:
            return StageOutcome(None, metrics)
        figures = build_figures(
            self.context,
            models.tokenizer,
            with_samples=has_samples,
            damaged=frozenset(reconstruction.read_damaged_ids()),
        )
        folder = f"{self._folder}/figures"
        figure_file(self.context, folder).write(0, figures)
        return StageOutcome(Evaluated(figures=folder), metrics)

    @property
    def _folder(self) -> str:
        return f"{self.name}/results/{fingerprint(self.collect_inputs())}"

    @property
    def _adm_sha256(self) -> str | None:
        source = self.context.config.evaluation.adm_reference
        return None if source is None else hash_adm_reference(source)

    def _load_adm_reference(self, models: EvaluationModels) -> ReferenceStatistics | None:
        source, sha256 = self.context.config.evaluation.adm_reference, self._adm_sha256
        if source is None or sha256 is None:
            return None
        evaluator_id = models.inception.evaluator_id
        return load_adm_reference(source, sha256=sha256, evaluator_id=evaluator_id)

    def _judge_reconstructions(self, work: ReconstructionWork) -> dict[str, Any]:
        context = self.context
        num_damaged = _count_damaged(
            work, LEAST_FID_IMAGES, f"{work.dataset.folder.root}: rFID needs at least"
        )
        chunks = [work.files.read(chunk) for chunk in work.chunks()]
        model = context.config.tokenizer.model
        histogram = CodeHistogram(model.num_codebooks, model.codebook_size)
        for chunk in chunks:
            histogram.update(chunk["codes"].long())
        names = [book.name for book in model.codebooks]
        logits = _join(chunks, "reconstruction_logits")
        by_class = torch.sort(_join(chunks, "labels"), stable=True).indices
        reference = self._fold_reference("rfid", work, "original_features", "val")
        fid = _compute_fid(work, "reconstruction_features", reference)
        results: dict[str, Any] = {
            "psnr": _mean(chunks, "psnr"),
            "psnr_mean_image": _mean(chunks, "psnr_mean_image"),
            "ssim": _mean(chunks, "ssim"),
            # The paper's evaluation states twice the range of its images (fqgan.md 3.2).
            "ssim_paper": _mean(chunks, "ssim_paper"),
            "rfid": fid.value,
            "rfid_evaluator": fid.evaluator_id,
            "rfid_reference": fid.reference_id,
            # Shards are shuffled; the paper's files are in class order, which reads far lower.
            "inception_score": compute_inception_score(logits).mean,
            "inception_score_class_order": compute_inception_score(logits[by_class]).mean,
            "usage": _by_name(names, histogram.usage),
            "perplexity": _by_name(names, histogram.perplexity),
            "codebook_size": model.codebook_size,
            "images": fid.num_samples,
        }
        if num_damaged:
            results["damaged_images"] = num_damaged
        semantic = [book.name for book in model.codebooks if book.teacher]
        # Groups of the training micro-batch's size: InfoNCE depends on the number of negatives.
        size = context.config.tokenizer.training.micro_batch_size
        info_nce = {name: _join(chunks, f"info_nce/{name}") for name in semantic}
        if any(map(len, info_nce.values())):
            results["info_nce_chance"] = math.log(size)
            results["info_nce"] = {name: float(losses.mean()) for name, losses in info_nce.items()}
        elif semantic:
            logger.warning("%d validation images: too few for InfoNCE of %d", fid.num_samples, size)
        self._write("reconstruction", results, fid, work)
        return {f"tokenizer/{name}": value for name, value in results.items()}

    def _judge_samples(
        self,
        reference: ReferenceWork,
        work: SampleFeatureWork,
        adm: ReferenceStatistics | None,
    ) -> dict[str, Any]:
        num_damaged = _count_damaged(
            reference,
            NUM_NEIGHBOURS + 1,
            f"{reference.dataset.folder.root}: precision and recall of samples need at least",
        )
        # Precision and recall need features, which ADM's file does not hold: training images'.
        statistics = adm or self._fold_reference("gfid", reference, "features", "train")
        fid = _compute_fid(work, "features", statistics)
        chunks = [work.files.read(chunk) for chunk in work.chunks()]
        nearest = _read_first(reference, "features", MANIFOLD_REFERENCE_IMAGES)
        quality = compute_precision_recall(nearest, _join(chunks, "features"))
        results: dict[str, Any] = {
            "gfid": fid.value,
            "gfid_evaluator": fid.evaluator_id,
            "gfid_reference": fid.reference_id,
            "inception_score": compute_inception_score(_join(chunks, "logits")).mean,
            "precision": quality.precision,
            "recall": quality.recall,
            "precision_recall_reference": self._name_split("train"),
            "precision_recall_reference_images": len(nearest),
            "labels": self.context.config.samples.labels,
            "images": fid.num_samples,
            "reference_images": fid.num_reference_samples,
        }
        if num_damaged:
            results["damaged_reference_images"] = num_damaged
        self._write("samples", results, fid, work)
        return {f"samples/{name}": value for name, value in results.items()}

    def _fold_reference(
        self, kind: FidKind, work: ImageWork, name: str, split: str
    ) -> ReferenceStatistics:
        return ReferenceStatistics(
            kind=kind,
            reference_id=self._name_split(split),
            evaluator_id=work.evaluator_id,
            moments=_fold(work, name),
        )

    def _name_split(self, split: str) -> str:
        return f"{split}:{getattr(self.context.read(DatasetIds), split)}"

    def _write(self, name: str, results: Mapping[str, Any], fid: FidScore, work: ImageWork) -> None:
        """Write `<name>.json`: the numbers with what they are to be compared by."""
        if not self.context.world.is_main:
            return
        document = {
            "evaluator": fid.evaluator_id,
            "reference": fid.reference_id,
            "reference_images": fid.num_reference_samples,
            "tokenizer_weights": self.context.read(TrainedTokenizer).weights,
            "fingerprint": work.files.fingerprint,
            "results": results,
        }
        data = json.dumps(document, indent=1, sort_keys=True).encode()
        self.context.storage.write_bytes(f"{self._folder}/{name}.json", data)


def figure_file(context: RunContext, folder: str) -> TensorFiles:
    return TensorFiles(context.storage, folder, "report")


def _compute_fid(work: ImageWork, name: str, reference: ReferenceStatistics) -> FidScore:
    return compute_fid(
        _fold(work, name), reference, kind=reference.kind, evaluator_id=work.evaluator_id
    )


def _fold(work: ImageWork, name: str) -> Moments:
    """Fold the moments of one feature set in chunk order."""
    features = (work.files.read(chunk)[name] for chunk in work.chunks())
    # Of a chunk may be nothing left, if all its images are damaged.
    return fold_ordered(compute_moments(values) for values in features if len(values))


def _count_damaged(work: ImageWork, least: int, need: str) -> int:
    """Count the damaged images of some work; a DataError if fewer than `least` are left."""
    num_damaged = len(work.read_damaged_ids())
    if num_damaged and work.count - num_damaged < least:
        raise DataError(
            f"{need} {least} images, but {num_damaged} of {work.count} are damaged; copy the "
            "dataset again, or leave 'evaluation' out of stages"
        )
    return num_damaged


def _read_first(work: ImageWork, name: str, count: int) -> Tensor:
    # Shards are class-mixed, so the first images are a fair few.
    parts: list[Tensor] = []
    for chunk in work.chunks():
        parts.append(work.files.read(chunk)[name])
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count]


def _mean(chunks: list[dict[str, Tensor]], name: str) -> float:
    return float(_join(chunks, name).double().mean())


def _join(chunks: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.cat([chunk[name] for chunk in chunks])


def _by_name(names: list[str], values: Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
