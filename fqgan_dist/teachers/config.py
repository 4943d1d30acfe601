"""Settings of the frozen teacher networks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from fqgan_dist.config import Config
from fqgan_dist.weights.config import WeightsConfig


def _check_divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part != 0:
        raise ValueError(
            f"{whole_name}: {whole} is not a multiple of {part_name} ({part}); nearest valid "
            f"values are {max(1, whole // part) * part} and {(whole // part + 1) * part}"
        )


class ClipArchitecture(Config):
    """An image tower of CLIP that has no name in open_clip; always QuickGELU."""

    image_size: PositiveInt
    """Height and width of the network's input, pixels."""
    patch_size: PositiveInt
    """Height and width of a patch, pixels."""
    width: PositiveInt
    """Width of the transformer; the size of the class token."""
    num_layers: PositiveInt
    """Number of transformer blocks."""
    num_heads: PositiveInt
    """Attention heads per block."""
    projection_dim: PositiveInt = 512
    """Width of CLIP's joint space: part of every checkpoint, unused by the features."""

    @model_validator(mode="after")
    def _check_sizes(self) -> ClipArchitecture:
        _check_divides("width", self.width, "num_heads", self.num_heads)
        _check_divides("image_size", self.image_size, "patch_size", self.patch_size)
        return self


class Dinov2Architecture(Config):
    """A DINOv2 network that has no name on the hub."""

    image_size: PositiveInt
    """Image side that the stored position embeddings belong to, pixels (518 when published)."""
    patch_size: PositiveInt
    """Height and width of a patch, pixels."""
    width: PositiveInt
    """Width of the transformer; the size of the class token."""
    num_layers: PositiveInt
    """Number of transformer blocks."""
    num_heads: PositiveInt
    """Attention heads per block."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Dinov2Architecture:
        _check_divides("width", self.width, "num_heads", self.num_heads)
        _check_divides("image_size", self.image_size, "patch_size", self.patch_size)
        return self


def _published_dinov2(width: int, num_layers: int, num_heads: int) -> Dinov2Architecture:
    return Dinov2Architecture(
        image_size=518, patch_size=14, width=width, num_layers=num_layers, num_heads=num_heads
    )


PUBLISHED_DINOV2 = {
    "facebook/dinov2-small": _published_dinov2(384, 12, 6),
    "facebook/dinov2-base": _published_dinov2(768, 12, 12),
    "facebook/dinov2-large": _published_dinov2(1024, 24, 16),
}
"""Sizes of the published networks, so that a cluster without the hub needs the file only."""


class ClipTeacherConfig(Config):
    """CLIP's image tower (open_clip) as a teacher."""

    kind: Literal["clip"] = "clip"
    """Which library and which token: open_clip, class token of the last block before ln_post."""
    name: str = "clip"
    """Name that codebooks and feature files call this teacher by."""
    architecture: str | ClipArchitecture
    """An open_clip model name with QuickGELU (`ViT-B-16-quickgelu`), or sizes."""
    weights: WeightsConfig
    """`hub` takes OpenAI's weights; a file is in open_clip's layout (`visual.*`)."""

    @model_validator(mode="after")
    def _check_hub(self) -> ClipTeacherConfig:
        _check_named_for_hub(self.architecture, self.weights)
        return self


class Dinov2TeacherConfig(Config):
    """DINOv2 (transformers) as a teacher."""

    kind: Literal["dinov2"] = "dinov2"
    """Which library and which token: transformers, class token after the final norm."""
    name: str = "dinov2"
    """Name that codebooks and feature files call this teacher by."""
    architecture: str | Dinov2Architecture
    """A hub name (`facebook/dinov2-small`), or sizes."""
    weights: WeightsConfig
    """`hub`, or a file in the layout that transformers saves."""
    input_size: PositiveInt = 224
    """Side of the network's input, pixels; position embeddings are interpolated to it."""

    @model_validator(mode="after")
    def _check(self) -> Dinov2TeacherConfig:
        _check_named_for_hub(self.architecture, self.weights)
        patch_size = self.sizes.patch_size
        _check_divides("input_size", self.input_size, "patch_size", patch_size)
        return self

    @property
    def sizes(self) -> Dinov2Architecture:
        """The network's sizes, looked up when it is named."""
        if isinstance(self.architecture, Dinov2Architecture):
            return self.architecture
        if self.architecture not in PUBLISHED_DINOV2:
            raise ValueError(
                f"architecture: {self.architecture!r} is unknown - expected one of "
                f"{', '.join(PUBLISHED_DINOV2)} - or give sizes"
            )
        return PUBLISHED_DINOV2[self.architecture]


TeacherConfig = Annotated[ClipTeacherConfig | Dinov2TeacherConfig, Field(discriminator="kind")]
"""Settings of one teacher, told apart by `kind`."""


def _check_named_for_hub(architecture: str | Config, weights: WeightsConfig) -> None:
    if weights.is_hub and not isinstance(architecture, str):
        raise ValueError(
            "weights.source: 'hub' has no network of these sizes - expected a file or 'random' - "
            "or name a published architecture"
        )


class TeachersConfig(Config):
    """Frozen encoders that supervise the semantic codebooks."""

    networks: tuple[TeacherConfig, ...] = ()
    """One for each semantic codebook, which refers to it by its name."""
    precompute: bool = True
    """Store the features of every view first; otherwise they are computed in the training step."""
    batch_size: int = Field(default=64, gt=0)
    """Images per forward pass."""
