"""All settings of a run: one section per stage, checked against each other."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fqgan_dist.autoregressive.config import AutoregressiveConfig
from fqgan_dist.autoregressive.sampling import SamplingConfig
from fqgan_dist.config import Config
from fqgan_dist.data.shard_cache import ShardCacheConfig
from fqgan_dist.data.views import ViewConfig
from fqgan_dist.evaluation.inception import PUBLISHED_RESOLUTION, InceptionConfig
from fqgan_dist.sharding.sources.opening import BUILTIN_PHOTOGRAPHS
from fqgan_dist.stages.execution import RayConfig
from fqgan_dist.stages.names import STAGE_NAMES, StageName
from fqgan_dist.stages.tokenizer_task import TokenizerLossConfig
from fqgan_dist.teachers.config import TeacherConfig
from fqgan_dist.telemetry.config import TelemetryConfig
from fqgan_dist.tokenizer.config import TokenizerConfig
from fqgan_dist.tokenizer.discriminator import DiscriminatorConfig
from fqgan_dist.tokenizer.perceptual import PerceptualConfig
from fqgan_dist.training.config import TrainingConfig


class StorageConfig(Config):
    """Where everything of a run is kept."""

    root: str
    """A path or an `s3://bucket/prefix` URI. Credentials come from the usual AWS places only."""


class DataConfig(Config):
    """Training and validation images."""

    source: str
    """Image folder, tar(.gz), zip, WebDataset shards (a folder, or `x-{000..146}.tar`), parquet, or
    a CSV/JSONL list of files; a path or s3://. Or `builtin:photographs`."""
    validation_source: str | None = None
    """Held-out images; None: `val` beside `source` if it is called `train`, else a share of it."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of `source` that is held out where it has no validation images beside it."""
    seed: int = 0
    """Key of the shards' permutation, the held-out share, the sample order and the views."""
    name: str = Field(default="images", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Folder of the shards under the storage root's `data/`."""
    samples_per_shard: int = Field(default=1000, gt=0)
    """Images per tar file."""
    short_side: int | None = Field(default=None, gt=0)
    """Resize training images so that the short side has this many pixels; None keeps the bytes."""
    crops_per_photograph: int = Field(default=128, gt=0)
    """With `builtin:photographs`: training crops of each."""
    views: ViewConfig
    """How training images are augmented."""
    num_views: int | None = Field(default=None, gt=0)
    """Distinct views per image; epoch e uses view e mod num_views. None: a new view every epoch."""
    window_shards: int = Field(default=8, gt=0)
    """Shards whose samples are shuffled together."""
    loader_workers: int = Field(default=0, ge=0)
    """Decoding processes per train worker; 0 decodes in a thread."""
    on_damage: Literal["replace", "fail"] = "replace"
    """What a training image with wrong bytes, or that cannot be decoded, does. `replace`: another
    image, fixed by data.seed and its place in the order, is trained on instead, which a warning and
    the stage's damaged_samples.jsonl say; `fail`: training stops."""
    max_damaged_in_a_row: int = Field(default=5, ge=2)
    """With `replace`: as many damaged images one after another, replacements included, fail."""
    cache: ShardCacheConfig | None = None
    """Local disk where training shards are kept; None reads every image from the storage. It only
    pays where the storage is remote."""

    @property
    def damage_limit(self) -> int:
        """Damaged images in a row that are an error."""
        return 1 if self.on_damage == "fail" else self.max_damaged_in_a_row

    @model_validator(mode="after")
    def _check_damage(self) -> DataConfig:
        default = type(self).model_fields["max_damaged_in_a_row"].default
        if self.on_damage == "fail" and self.max_damaged_in_a_row != default:
            raise ValueError(
                f"max_damaged_in_a_row: {self.max_damaged_in_a_row} has no effect with on_damage: "
                "'fail'; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_effect(self) -> DataConfig:
        if self.validation_source is None:
            return self
        if self.source == BUILTIN_PHOTOGRAPHS:
            raise ValueError(
                f"validation_source: {self.validation_source!r} has no effect with source: "
                f"{self.source!r}, which brings its own; remove it"
            )
        default = type(self).model_fields["validation_fraction"].default
        if self.validation_fraction != default:
            raise ValueError(
                f"validation_fraction: {self.validation_fraction} has no effect with "
                f"validation_source: {self.validation_source!r}; remove one of them"
            )
        return self


class TeachersConfig(Config):
    """Frozen encoders that supervise the semantic codebooks."""

    networks: tuple[TeacherConfig, ...] = ()
    """One for each semantic codebook, which refers to it by its name."""
    precompute: bool = True
    """Store the features of every view first; otherwise they are computed in the training step."""
    batch_size: int = Field(default=64, gt=0)
    """Images per forward pass."""


class TokenizerStageConfig(Config):
    """The tokenizer, what it is trained against, and how."""

    model: TokenizerConfig
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    perceptual: PerceptualConfig
    losses: TokenizerLossConfig = TokenizerLossConfig()
    training: TrainingConfig

    @model_validator(mode="after")
    def _check_zero_stage(self) -> TokenizerStageConfig:
        if self.training.zero_stage > 2:
            raise ValueError(
                f"training.zero_stage: {self.training.zero_stage} cannot train the tokenizer, "
                f"whose loss flows through two partitioned models; use 0, 1 or 2"
            )
        return self


class CodesConfig(Config):
    """Extraction of the codes that FAR is trained on."""

    views: ViewConfig
    """Crops of every training image (the paper: ten_crop at ratio 1.1)."""
    batch_size: int = Field(default=64, gt=0)
    """Crops per forward pass; part of the fingerprint, as it can move the last bit."""


class AutoregressiveStageConfig(Config):
    """The generator and how it is trained."""

    model: AutoregressiveConfig
    training: TrainingConfig


class SamplesConfig(Config):
    """Images drawn from the generator."""

    count: int = Field(gt=0)
    """Number of samples."""
    chunk_size: int = Field(gt=0)
    """Samples per unit of work; part of the fingerprint."""
    seed: int = 0
    """Key of every sample's random numbers, with its id."""
    labels: Literal["balanced", "random"] = "balanced"
    """`balanced`: sample i has class i mod num_classes; `random`: each class is drawn uniformly by
    (seed, id), as in the paper."""
    sampling: SamplingConfig
    export: Literal["none", "npz", "png", "webdataset"] = "none"
    """Images to write besides the codes, with their labels, under `samples/exports/`; it moves no
    sample, so it may be asked for at any time."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the samples."""
        return self.model_dump(mode="json", exclude={"export"})


class EvaluationConfig(Config):
    """What is measured on reconstructions and samples."""

    inception: InceptionConfig
    chunk_size: int = Field(gt=0)
    """Images per unit of work; part of the fingerprint."""
    batch_size: int = Field(gt=0)
    """Images per Inception pass; part of the fingerprint."""
    reference_samples: int | None = Field(default=None, gt=0)
    """Training images (centre crops) that gFID, precision and recall are measured against (the last
    two against 10,000 at most); None takes all."""
    adm_reference: str | None = None
    """ADM's .npz file (path or s3:// URI; `mu`, `sigma`) that gFID is measured against, as in the
    paper; precision and recall stay against training images. None: the training images."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide features and per-image scores."""
        return self.model_dump(mode="json", exclude={"adm_reference"})

    @model_validator(mode="after")
    def _check_adm_reference(self) -> EvaluationConfig:
        if self.adm_reference is None:
            return self
        inception = self.inception
        if inception.weights.source == "random" or inception.resolution != PUBLISHED_RESOLUTION:
            raise ValueError(
                f"adm_reference: {self.adm_reference!r} was made by the published Inception "
                f"network at {PUBLISHED_RESOLUTION} pixels, but inception has weights.source "
                f"{inception.weights.source!r} and resolution {inception.resolution}; use that "
                "network, or adm_reference: null"
            )
        return self


class RunConfig(Config):
    """One run of the pipeline."""

    name: str
    """Shown in the report."""
    storage: StorageConfig
    execution: Literal["local", "ray"] = "local"
    """`local`: every stage in this process. `ray`: train workers and actor pools on a cluster."""
    ray: RayConfig = RayConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU of this process if there is one."""
    num_threads: int | None = Field(default=None, gt=0)
    """CPU threads of a process; None leaves torch's choice. Results on CPU depend on it."""
    stages: tuple[StageName, ...] = STAGE_NAMES
    """Stages to run, whatever their order here."""
    telemetry: TelemetryConfig = TelemetryConfig()
    data: DataConfig
    teachers: TeachersConfig = TeachersConfig()
    tokenizer: TokenizerStageConfig
    codes: CodesConfig
    autoregressive: AutoregressiveStageConfig
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _check_sections_agree(self) -> RunConfig:
        tokenizer, model = self.tokenizer.model, self.autoregressive.model
        problems = [
            f"{field} is {theirs!r}, but tokenizer.model gives {ours!r}; make them equal"
            for field, theirs, ours in (
                (
                    "autoregressive.model.num_codebooks",
                    model.num_codebooks,
                    tokenizer.num_codebooks,
                ),
                (
                    "autoregressive.model.codebook_size",
                    model.codebook_size,
                    tokenizer.codebook_size,
                ),
                ("autoregressive.model.grid_size", model.grid_size, tokenizer.grid_size),
                ("data.views.image_size", self.data.views.image_size, tokenizer.image_size),
                ("codes.views.image_size", self.codes.views.image_size, tokenizer.image_size),
            )
            if theirs != ours
        ]
        wanted = {book.teacher for book in tokenizer.codebooks if book.teacher is not None}
        given = {teacher.name for teacher in self.teachers.networks}
        problems += [
            f"teachers.networks: {name!r} is named by a codebook but not configured"
            for name in sorted(wanted - given)
        ]
        problems += [
            f"teachers.networks: {name!r} is configured but no codebook names it; remove it"
            for name in sorted(given - wanted)
        ]
        if wanted and self.teachers.precompute and self.data.num_views is None:
            problems.append(
                "data.num_views: required with teachers.precompute, as features are stored per "
                "view; set it, or teachers.precompute=false"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
