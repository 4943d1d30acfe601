"""All settings of a run: one section per stage, checked against each other."""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, model_validator

from fqgan_dist.autoregressive.config import AutoregressiveConfig, SamplesConfig
from fqgan_dist.config import Config
from fqgan_dist.data.config import DataConfig, ViewConfig
from fqgan_dist.evaluation.config import EvaluationConfig
from fqgan_dist.orchestration.config import RayConfig
from fqgan_dist.stages.catalog import stage_names
from fqgan_dist.teachers.config import TeachersConfig
from fqgan_dist.telemetry.config import TelemetryConfig
from fqgan_dist.tokenizer.config import (
    DiscriminatorConfig,
    PerceptualConfig,
    TokenizerConfig,
    TokenizerLossConfig,
)
from fqgan_dist.training.config import TrainingConfig


class StorageConfig(Config):
    """Where everything of a run is kept."""

    root: str
    """A path or an `s3://bucket/prefix` URI. Credentials come from the usual AWS places only."""


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
    stages: tuple[str, ...] = Field(default_factory=stage_names)
    """Stages to run, whatever their order here."""
    upstream: dict[str, str] = Field(default_factory=dict)
    """Stages that are not run here but taken from another run that has finished them: stage ->
    storage root of that run. Their settings here must be those that they were made from."""
    telemetry: TelemetryConfig = TelemetryConfig()
    data: DataConfig
    teachers: TeachersConfig = TeachersConfig()
    tokenizer: TokenizerStageConfig
    codes: CodesConfig
    autoregressive: AutoregressiveStageConfig
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _check_stage_names(self) -> RunConfig:
        known = stage_names()
        for field, names in (
            ("stages", self.stages),
            ("upstream", self.upstream),
            ("ray.pools", self.ray.pools),
        ):
            for name in names:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                    raise ValueError(f"{field}: {name!r} is no stage; {hint}")
        if (
            "samples" in self.stages
            and self.samples.export != "none"
            and "exports" not in self.stages
        ):
            raise ValueError(
                f"samples.export: {self.samples.export!r} has no effect without stage 'exports'; "
                f"add it to stages, or set samples.export: none"
            )
        return self

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
