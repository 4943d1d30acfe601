"""The chunked work of the evaluation: Inception features and scores of images.

Chunks are ranges of sample ids; the Inception network always sees batches of one size, the last one
padded, so that an image's features do not depend on its neighbours' number. A damaged image
(`data.on_damage`) is left out of the output, of reconstructions and originals alike.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.chunks import ProcessLocalCaches
from fqgan_dist.data.dataset import Dataset
from fqgan_dist.data.decoding import to_float, to_uint8
from fqgan_dist.data.index import load_samples
from fqgan_dist.data.tensor_files import TensorFiles
from fqgan_dist.errors import DataError
from fqgan_dist.evaluation.reconstruction import PAPER_SSIM_RANGE, compute_psnr, compute_ssim
from fqgan_dist.fingerprint import fingerprint
from fqgan_dist.stages.damage import DamagedSample, DamageNotes
from fqgan_dist.stages.id_ranges import IdRanges
from fqgan_dist.stages.images import CroppedImages, ImageReader, center_view, count_chunks
from fqgan_dist.stages.network_ids import NetworkIds
from fqgan_dist.stages.samples import read_samples, sample_files
from fqgan_dist.stages.shards import DatasetIds, open_dataset
from fqgan_dist.stages.stage import RunContext
from fqgan_dist.stages.teachers import compute_features, load_same_teachers
from fqgan_dist.stages.tokenizer import TrainedTokenizer, decode_in_batches, load_tokenizer
from fqgan_dist.teachers.teacher import Teacher
from fqgan_dist.tokenizer.losses import info_nce_loss
from fqgan_dist.tokenizer.model import FactorizedTokenizer
from fqgan_dist.weights.staging import resolve_weights

if TYPE_CHECKING:
    from fqgan_dist.evaluation.inception import InceptionFeatures

NUM_FIGURE_IMAGES = 12
SAMPLES_PER_CLASS = 4
MAX_FIGURE_CLASSES = 20
# Training images that precision and recall see at most, as ADM's (fqgan.md 3.1): their cost is
# quadratic.
MANIFOLD_REFERENCE_IMAGES = 10_000
# Tensor of a chunk that has damaged images.
_DAMAGED_IDS = "damaged_ids"


class EvaluationModels(ProcessLocalCaches):
    """The networks that the evaluation needs, each built at its first use in a process."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.network_ids = NetworkIds()

    @functools.cached_property
    def inception(self) -> InceptionFeatures:
        """The feature network."""
        # torch-fidelity imports torchvision: 2 CPU-seconds of every process that knows the stages.
        from fqgan_dist.evaluation.inception import build_inception

        config = self.context.config.evaluation.inception
        path = resolve_weights(config.weights, field="evaluation.inception.weights")
        inception = build_inception(config, device=self.context.device, weights_path=path)
        self.network_ids.confirm("Inception", inception.evaluator_id)
        return inception

    @functools.cached_property
    def tokenizer(self) -> FactorizedTokenizer:
        return load_tokenizer(self.context)

    @functools.cached_property
    def teachers(self) -> dict[str, Teacher]:
        return load_same_teachers(self.context, self.network_ids)


class ImageWork(IdRanges, ABC):
    """Base of work on ranges of `count` ids that needs the tokenizer and Inception."""

    unit = "images"

    def __init__(
        self, context: RunContext, models: EvaluationModels, name: str, count: int, chunk_size: int
    ) -> None:
        super().__init__(count, chunk_size)
        self.context = context
        self.models = models
        self.description = f"evaluating {name}"
        identity = {
            "work": name,
            "evaluation": context.config.evaluation.identity(),
            "evaluator": self.evaluator_id,
            "count": count,
            "chunk_size": chunk_size,
            **self.identity(),
        }
        self.files = TensorFiles(context.storage, f"evaluation/{name}", fingerprint(identity))
        self.notes = DamageNotes(context.storage, "evaluation", self.files.fingerprint)

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Name the images that are worked on."""

    @abstractmethod
    def process(self, chunk: int) -> None:
        """Make and commit the chunk's output."""

    def is_done(self, chunk: int) -> bool:
        return self.files.exists(chunk)

    def commit(
        self,
        chunk: int,
        rows: CroppedImages,
        per_image: Mapping[str, Tensor],
        *,
        others: Mapping[str, Tensor] | None = None,
        others_damage: Sequence[DamagedSample] = (),
    ) -> None:
        """Commit what was computed of a chunk's images, without the rows of damaged ones.

        Args:
            chunk: its number.
            rows: the images.
            per_image: tensors with a row for each of them.
            others: tensors of something else, made of undamaged images alone.
            others_damage: what was damaged of that.
        """
        self.notes.write(chunk, [*rows.damage.values(), *others_damage])
        sound = rows.is_sound
        tensors = {name: tensor[sound] for name, tensor in per_image.items()} | dict(others or {})
        if rows.damage:
            ids = self.ids(chunk)
            tensors[_DAMAGED_IDS] = torch.tensor([ids[row] for row in rows.damage])
        self.files.write(chunk, tensors)

    def read_damaged_ids(self) -> list[int]:
        """Read the ids of the damaged images, which are left out of the chunks; ascending."""
        found = [self.files.read(chunk).get(_DAMAGED_IDS) for chunk in self.chunks()]
        return [number for ids in found if ids is not None for number in ids.tolist()]

    @property
    def evaluator_id(self) -> str:
        return self.models.inception.evaluator_id

    @torch.inference_mode()
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (n, 2048) and logits (n, 1008) of uint8 images, on the CPU."""
        batch_size = self.context.config.evaluation.batch_size
        features, logits = [], []
        for batch in images.split(batch_size):
            ACTIVITY.move()
            padding = batch[-1:].expand(batch_size - len(batch), -1, -1, -1)
            padded = torch.cat([batch, padding]).to(self.context.device)
            feature, logit = self.models.inception(padded)
            features.append(feature[: len(batch)].cpu())
            logits.append(logit[: len(batch)].cpu())
        return torch.cat(features), torch.cat(logits)


class ReconstructionWork(ImageWork):
    """Validation images against their reconstructions."""

    def __init__(self, context: RunContext, models: EvaluationModels) -> None:
        self.dataset = open_dataset(context, "val")
        config = context.config
        # Whole InfoNCE groups: a chunk holds a multiple of the micro-batch size.
        group = config.tokenizer.training.micro_batch_size
        chunk_size = -(-config.evaluation.chunk_size // group) * group
        super().__init__(
            context, models, "reconstruction", self.dataset.index.num_samples, chunk_size
        )

    def identity(self) -> Mapping[str, Any]:
        return {
            "dataset": self.dataset.id,
            "train": self.context.read(DatasetIds).train,
            "tokenizer": self.context.read(TrainedTokenizer).weights,
            "teachers": {
                name: teacher.fingerprint for name, teacher in self.models.teachers.items()
            },
        }

    @torch.inference_mode()
    def process(self, chunk: int) -> None:
        context = self.context
        rows = self._reader.read_rows(self.ids(chunk))
        images = rows.images
        group = context.config.tokenizer.training.micro_batch_size
        reconstructions, codes = [], []
        tokens: list[Mapping[str, Tensor]] = []
        targets: list[Mapping[str, Tensor]] = []
        for batch in images.split(group):
            ACTIVITY.move()
            output = self.models.tokenizer(to_float(batch.to(context.device)))
            reconstructions.append(to_uint8(output.reconstruction).cpu())
            codes.append(output.codes.cpu())
            tokens.append(output.class_tokens)
            targets.append(compute_features(self.models.teachers, batch.to(context.device)))
        decoded = torch.cat(reconstructions)
        original_features, _ = self.extract(images)
        features, logits = self.extract(decoded)
        mean_image, mean_rows = self._mean_image
        self.commit(
            chunk,
            rows,
            {
                "psnr": compute_psnr(decoded, images),
                "psnr_mean_image": compute_psnr(mean_image.expand_as(images), images),
                "ssim": compute_ssim(decoded, images),
                "ssim_paper": compute_ssim(decoded, images, data_range=PAPER_SSIM_RANGE),
                "labels": rows.labels,
                "codes": torch.cat(codes).to(torch.int32),
                "original_features": original_features,
                "reconstruction_features": features,
                "reconstruction_logits": logits,
            },
            others={
                f"info_nce/{book.name}": _compute_group_losses(
                    torch.cat([part[book.teacher] for part in tokens])[rows.is_sound],
                    torch.cat([part[book.teacher] for part in targets])[rows.is_sound],
                    group,
                )
                for book in context.config.tokenizer.model.codebooks
                if book.teacher
            },
            others_damage=list(mean_rows.damage.values()),
        )

    @functools.cached_property
    def _reader(self) -> ImageReader:
        return ImageReader(self.dataset, self.context.config.data, center_view(self.context))

    @functools.cached_property
    def _mean_image(self) -> tuple[Tensor, CroppedImages]:
        """The mean of (up to 1024) training images, (3, H, W) uint8: the baseline of PSNR."""
        dataset = open_dataset(self.context, "train")
        reader = ImageReader(dataset, self.context.config.data, center_view(self.context))
        rows = reader.read_rows(range(min(1024, dataset.index.num_samples)))
        images = rows.images[rows.is_sound]
        if not len(images):
            raise DataError(
                f"{dataset.folder.root}: the first {len(rows.keys)} training images, whose mean is "
                "a baseline of PSNR, are all damaged; check them with `fqgan-data verify`"
            )
        return images.double().mean(dim=0).round().to(torch.uint8), rows


class ReferenceWork(ImageWork):
    """Inception features of training images, for gFID, precision and recall."""

    def __init__(self, context: RunContext, models: EvaluationModels) -> None:
        self.dataset = open_dataset(context, "train")
        evaluation = context.config.evaluation
        count = min(
            evaluation.reference_samples or self.dataset.index.num_samples,
            self.dataset.index.num_samples,
        )
        if evaluation.adm_reference is not None:  # gFID needs none of them
            count = min(count, MANIFOLD_REFERENCE_IMAGES)
        super().__init__(context, models, "reference", count, evaluation.chunk_size)

    def identity(self) -> Mapping[str, Any]:
        return {"dataset": self.dataset.id}

    def process(self, chunk: int) -> None:
        view = center_view(self.context)
        reader = ImageReader(self.dataset, self.context.config.data, view)
        rows = reader.read_rows(self.ids(chunk))
        features, _ = self.extract(rows.images)
        self.commit(chunk, rows, {"features": features})


class SampleFeatureWork(ImageWork):
    """Inception features of generated images; its chunks are the samples' chunks."""

    def __init__(self, context: RunContext, models: EvaluationModels) -> None:
        self.samples = sample_files(context)
        samples = context.config.samples
        super().__init__(context, models, "samples", samples.count, samples.chunk_size)

    def identity(self) -> Mapping[str, Any]:
        return {
            "samples": self.samples.fingerprint,
            "tokenizer": self.context.read(TrainedTokenizer).weights,
        }

    def process(self, chunk: int) -> None:
        codes, _ = read_samples(self.samples, chunk)
        batch_size = self.context.config.evaluation.batch_size
        images = decode_in_batches(self.models.tokenizer, codes, self.context.device, batch_size)
        features, logits = self.extract(images)
        self.files.write(chunk, {"features": features, "logits": logits})


def _compute_group_losses(tokens: Tensor, targets: Tensor, group: int) -> Tensor:
    """Compute InfoNCE of each `group` images, (n // group,), on the CPU."""
    losses = [
        info_nce_loss(some_tokens, some_targets).cpu()
        for some_tokens, some_targets in zip(tokens.split(group), targets.split(group), strict=True)
        if len(some_tokens) == group  # a smaller group has fewer negatives: another loss
    ]
    return torch.stack(losses) if losses else torch.empty(0)


@torch.inference_mode()
def build_figures(
    context: RunContext,
    tokenizer: FactorizedTokenizer,
    *,
    with_samples: bool,
    damaged: Collection[int],
) -> dict[str, Tensor]:
    """Make the images of the report: originals, reconstructions, single codebooks, samples.

    Each is (n, 3, H, W) uint8, by name. Validation images whose ids are `damaged` are not shown.
    """
    dataset = open_dataset(context, "val")
    reader = ImageReader(dataset, context.config.data, center_view(context))
    images = torch.cat(
        [
            reader.read_rows(range(row, row + 1)).images
            for row in _choose_figure_rows(dataset, damaged)
        ]
    )
    codes = tokenizer.encode_codes(to_float(images.to(context.device)))
    decode = functools.partial(
        decode_in_batches, tokenizer, codes.cpu(), context.device, len(images)
    )
    figures = {"originals": images, "reconstructions": decode()}
    for position, book in enumerate(context.config.tokenizer.model.codebooks):
        figures[f"single/{book.name}"] = decode(keep=[position])
    if with_samples:
        figures |= _sample_figures(context, tokenizer)
    return figures


def _choose_figure_rows(dataset: Dataset, damaged: Collection[int]) -> list[int]:
    """Choose validation images to show: the first of each class, then the first of all."""
    labels: dict[int, int] = {}
    first = 0
    for entry in dataset.index.shards:
        found = enumerate(load_samples(dataset.folder, entry).labels.tolist(), first)
        labels |= {row: label for row, label in found if row not in damaged}
        first += entry.count
        if len(set(labels.values())) >= min(NUM_FIGURE_IMAGES, dataset.index.num_classes):
            break
    # Of equal labels the first one is kept.
    first_of_class = {label: row for row, label in reversed(labels.items())}.values()
    others = [row for row in labels if row not in set(first_of_class)]
    return sorted([*sorted(first_of_class), *others][:NUM_FIGURE_IMAGES])


def _sample_figures(context: RunContext, tokenizer: FactorizedTokenizer) -> dict[str, Tensor]:
    files = sample_files(context)
    settings = context.config.samples
    index = open_dataset(context, "train").index
    wanted: dict[int, list[Tensor]] = {
        label: [] for label in range(min(MAX_FIGURE_CLASSES, index.num_classes))
    }
    for chunk in range(count_chunks(settings.count, settings.chunk_size)):
        codes, labels = read_samples(files, chunk)
        for code, label in zip(codes, labels.tolist(), strict=True):
            if len(wanted.get(label, [None] * SAMPLES_PER_CLASS)) < SAMPLES_PER_CLASS:
                wanted[label].append(code)
    return {
        f"samples/{index.classes[label]}": decode_in_batches(
            tokenizer, torch.stack(codes), context.device, len(codes)
        )
        for label, codes in wanted.items()
        if codes
    }
