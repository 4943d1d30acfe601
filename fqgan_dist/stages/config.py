"""All settings of a run: one section per stage, checked against each other.

What follows from other settings, such as the generator's number of codebooks, need not be given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fqgan_dist.activity import WatchdogConfig
from fqgan_dist.autoregressive.config import AutoregressiveConfig, SamplesConfig
from fqgan_dist.config import Config, describe_unknown
from fqgan_dist.data.config import DataConfig, ViewConfig
from fqgan_dist.evaluation.config import EvaluationConfig
from fqgan_dist.orchestration.config import RayConfig
from fqgan_dist.stages.catalog import stage_names
from fqgan_dist.storage.uri import Location
from fqgan_dist.teachers.config import TeachersConfig
from fqgan_dist.telemetry.config import TelemetryConfig
from fqgan_dist.termination import TerminationConfig
from fqgan_dist.tokenizer.config import (
    CodebookConfig,
    DiscriminatorConfig,
    PerceptualConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    modernize_perceptual,
)
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.waiting import PatienceConfig
from fqgan_dist.weights.config import InitialWeights


class StorageConfig(Config):
    """Where everything of a run is kept."""

    root: Location
    """A path or an `s3://bucket/prefix` URI. Credentials come from the usual AWS places only."""


class TrainedStageConfig(Config):
    """What both trained models are given."""

    training: TrainingConfig
    init_from: InitialWeights | None = None
    """Weights that the model starts from, at step 0 and with a fresh optimizer; None draws them. A
    checkpoint of the run itself goes before: it is continued."""

    def initial_settings(self) -> dict[str, Any]:
        """Name what the training starts from, if that is given, as records of stages hold it."""
        return {"init_from": self.init_from.identity()} if self.init_from else {}


class TokenizerStageConfig(TrainedStageConfig):
    """The tokenizer, what it is trained against, and how."""

    model: TokenizerConfig
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    perceptual: PerceptualConfig
    losses: TokenizerLossConfig = TokenizerLossConfig()

    @model_validator(mode="before")
    @classmethod
    def _seed_former_spelling(cls, values: Any) -> Any:
        # Random weights that are spelt as formerly get the seed that they had then.
        seed = _find(values, "training.seed")
        if not isinstance(values, dict) or not isinstance(seed, int) or "perceptual" not in values:
            return values
        perceptual = modernize_perceptual(values["perceptual"], training_seed=seed)
        return values | {"perceptual": perceptual}

    def find_problems(self) -> Iterator[str]:
        if self.training.zero_stage > 2:
            yield (
                f"training.zero_stage: {self.training.zero_stage} cannot train the tokenizer, "
                f"whose loss flows through two partitioned models; use 0, 1 or 2"
            )


class CodesConfig(Config):
    """Extraction of the codes that FAR is trained on."""

    views: ViewConfig
    """Crops of every training image (the paper: ten_crop at ratio 1.1)."""
    batch_size: int = Field(default=64, gt=0)
    """Crops per forward pass; part of the fingerprint, as it can move the last bit."""


class AutoregressiveStageConfig(TrainedStageConfig):
    """The generator and how it is trained."""

    model: AutoregressiveConfig


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
    """Stages to run, whatever their order here; `samples` names `exports` too."""
    upstream: dict[str, Location] = Field(default_factory=dict)
    """Stages that are not run here but taken from another run that has finished them: stage ->
    storage root of that run. Their settings here must be those that they were made from."""
    telemetry: TelemetryConfig = TelemetryConfig()
    patience: PatienceConfig = PatienceConfig()
    """How long is waited for what passes by itself."""
    termination: TerminationConfig = TerminationConfig()
    """How it ends at SIGTERM or Ctrl-C."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """After how long without a move a rank or actor is believed to hang."""
    data: DataConfig
    teachers: TeachersConfig = TeachersConfig()
    tokenizer: TokenizerStageConfig
    codes: CodesConfig
    autoregressive: AutoregressiveStageConfig
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @field_validator("stages")
    @classmethod
    def _name_exports(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        # Configs that were written before exports were a stage of their own name `samples` alone.
        return (*stages, "exports") if "samples" in stages and "exports" not in stages else stages

    @property
    def is_deterministic(self) -> bool:
        return self.tokenizer.training.deterministic or self.autoregressive.training.deterministic

    def find_problems(self) -> Iterator[str]:
        yield from self._find_unknown_stages()
        yield from self._find_disagreements()
        yield from self._find_teacher_problems()

    def _find_unknown_stages(self) -> Iterator[str]:
        known = stage_names()
        for field, names in (
            ("stages", self.stages),
            ("upstream", self.upstream),
            ("ray.pools", self.ray.pools),
        ):
            for name in names:
                if name not in known:
                    yield f"{field}: {name!r} is no stage; {describe_unknown(name, known)}"

    def _find_disagreements(self) -> Iterator[str]:
        for each in _DERIVED:
            given, derived = _find(self, each.field), each.compute_fn(self.tokenizer.model)
            if given != derived:
                yield _describe_disagreement(each.field, given, each.source, derived)
        for number, teacher in enumerate(self.teachers.networks):
            for position, book in enumerate(self.tokenizer.model.codebooks):
                if book.teacher == teacher.name and book.feature_dim != teacher.feature_dim:
                    yield _describe_disagreement(
                        f"tokenizer.model.codebooks.{position}.feature_dim",
                        book.feature_dim,
                        f"teachers.networks.{number} ({teacher.name})",
                        teacher.feature_dim,
                    )

    def _find_teacher_problems(self) -> Iterator[str]:
        codebooks = self.tokenizer.model.codebooks
        wanted = {book.teacher for book in codebooks if book.teacher is not None}
        given = {teacher.name for teacher in self.teachers.networks}
        for name in sorted(wanted - given):
            yield f"teachers.networks: {name!r} is named by a codebook but not configured"
        for name in sorted(given - wanted):
            yield f"teachers.networks: {name!r} is configured but no codebook names it; remove it"
        if wanted and self.teachers.precompute and self.data.num_views is None:
            yield (
                "data.num_views: required with teachers.precompute, as features are stored per "
                "view; set it, or teachers.precompute=false"
            )

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, values: Any) -> Any:
        """Give what follows from other settings its value, unless it is given."""
        if not isinstance(values, dict):
            return values
        filled = copy.deepcopy(values)
        feature_dims = _find_feature_dims(filled)
        for book in _find_items(filled, "tokenizer.model.codebooks"):
            if isinstance(book, dict) and str(book.get("teacher")) in feature_dims:
                book.setdefault("feature_dim", feature_dims[book["teacher"]])
        tokenizer = _parse_tokenizer(filled)
        for each in _DERIVED:
            path, _, name = each.field.rpartition(".")
            group = _find(filled, path)
            if isinstance(group, dict):
                group.setdefault(name, each.compute_fn(tokenizer))
        return filled

    @model_serializer(mode="wrap")
    def _leave_out_derived(self, dump_fn: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What follows from others is not dumped, so an override changes one place.
        values = dump_fn(self)
        for each in _DERIVED:
            path, _, name = each.field.rpartition(".")
            group = _find(values, path)
            if isinstance(group, dict):
                group.pop(name, None)
        for book in _find_items(values, "tokenizer.model.codebooks"):
            book.pop("feature_dim", None)
        return values


@dataclass(frozen=True)
class _Derived:
    """A setting that follows from the tokenizer's model."""

    field: str
    source: str
    """The settings that it follows from, for messages."""
    compute_fn: Callable[[TokenizerConfig], int]


_IMAGE_SIZE = "tokenizer.model.image_size"
# What the sections of the data, the codes and the generator take from the tokenizer's; besides, the
# `feature_dim` of a codebook follows from its teacher.
_DERIVED = (
    _Derived("data.views.image_size", _IMAGE_SIZE, lambda model: model.image_size),
    _Derived("codes.views.image_size", _IMAGE_SIZE, lambda model: model.image_size),
    _Derived(
        "autoregressive.model.num_codebooks",
        "the number of tokenizer.model.codebooks",
        lambda model: model.num_codebooks,
    ),
    _Derived(
        "autoregressive.model.codebook_size",
        "tokenizer.model.codebook_size",
        lambda model: model.codebook_size,
    ),
    _Derived(
        "autoregressive.model.grid_size",
        f"{_IMAGE_SIZE} with channel_multipliers",
        lambda model: model.grid_size,
    ),
)


def _describe_disagreement(field: str, given: object, source: str, derived: object) -> str:
    return (
        f"{field} is {given!r}, but {source} gives {derived!r}; "
        f"remove {field.rpartition('.')[2]}, which follows from it, or make them agree"
    )


def _find(values: Any, field: str) -> Any:
    """Look up a dotted name in plain values or in a config; None where it leads nowhere."""
    for part in field.split("."):
        if isinstance(values, dict):
            values = values.get(part)
        else:
            values = getattr(values, part) if isinstance(values, Config) else None
    return values


def _find_items(values: Any, field: str) -> Sequence[Any]:
    items = _find(values, field)
    return items if isinstance(items, list | tuple) else ()


# What is wrong itself is reported where it stands, and not again by what follows from it.


def _find_feature_dims(values: dict[str, Any]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for network in _find_items(values, "teachers.networks"):
        with suppress(ValidationError):
            (teacher,) = TeachersConfig(networks=(network,)).networks
            dims[teacher.name] = teacher.feature_dim
    return dims


def _parse_tokenizer(values: dict[str, Any]) -> TokenizerConfig:
    try:
        return TokenizerConfig.model_validate(_find(values, "tokenizer.model"))
    except ValidationError:
        return TokenizerConfig(codebooks=(CodebookConfig(name="any"),))
