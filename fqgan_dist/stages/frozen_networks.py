"""Weights that a run needs and does not make: one list for all that look for them."""

from __future__ import annotations

from dataclasses import dataclass

from fqgan_dist.evaluation.config import InceptionConfig
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.teachers.config import TeacherConfig
from fqgan_dist.tokenizer.config import PerceptualConfig
from fqgan_dist.weights.config import WeightsConfig


@dataclass(frozen=True, kw_only=True)
class NeededWeights:
    """Weights that the config names."""

    field: str
    """Where they stand in the config."""
    weights: WeightsConfig
    readers: frozenset[str]
    """The stages that read them."""


@dataclass(frozen=True, kw_only=True)
class FrozenNetwork(NeededWeights):
    """A pretrained network whose weights no stage moves."""

    name: str
    """Names the network among those of the run; a file of its weights is called so."""
    title: str
    """What people call it."""
    settings: TeacherConfig | PerceptualConfig | InceptionConfig

    @property
    def group(self) -> str:
        """Where its settings stand in the config."""
        return self.field.removesuffix(".weights")


def frozen_networks(config: RunConfig) -> list[FrozenNetwork]:
    """List the frozen networks of a run."""
    # The evaluation measures InfoNCE, for which it runs the teachers on validation images.
    trainer = "teachers" if config.teachers.precompute else "tokenizer"
    perceptual, inception = config.tokenizer.perceptual, config.evaluation.inception
    return [
        *(
            FrozenNetwork(
                field=f"teachers.networks.{number}.weights",
                weights=teacher.weights,
                readers=frozenset({trainer, "evaluation"}),
                name=teacher.name,
                title=f"teacher {teacher.name}",
                settings=teacher,
            )
            for number, teacher in enumerate(config.teachers.networks)
        ),
        FrozenNetwork(
            field="tokenizer.perceptual.weights",
            weights=perceptual.weights,
            readers=frozenset({"tokenizer"}),
            name=f"perceptual-{perceptual.network}",
            title="perceptual loss",
            settings=perceptual,
        ),
        FrozenNetwork(
            field="evaluation.inception.weights",
            weights=inception.weights,
            readers=frozenset({"evaluation"}),
            name="inception",
            title="Inception",
            settings=inception,
        ),
    ]


def needed_weights(config: RunConfig) -> list[NeededWeights]:
    """List the weights of frozen networks and those that a training starts from."""
    given: dict[str, WeightsConfig | None] = {
        "tokenizer": config.tokenizer.init_from,
        "autoregressive": config.autoregressive.init_from,
    }
    return [
        *frozen_networks(config),
        *(
            NeededWeights(field=f"{stage}.init_from", weights=weights, readers=frozenset({stage}))
            for stage, weights in given.items()
            if weights is not None
        ),
    ]


def describe_random_weights(config: RunConfig) -> list[str]:
    """Say which networks make scores incomparable; nothing where none does."""
    random = [network.title for network in frozen_networks(config) if network.weights.is_random]
    if not random:
        return []
    return [
        f"Random weights ({', '.join(random)}): scores of this run are not comparable with "
        "published numbers."
    ]
