"""Settings of the frozen teacher networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from fqgan_dist.config import Config
from fqgan_dist.weights.config import WeightsConfig


def _find_remainder(whole_name: str, whole: int, part_name: str, part: int) -> Iterator[str]:
    if whole % part != 0:
        yield (
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

    def find_problems(self) -> Iterator[str]:
        """Find sizes that do not divide each other."""
        yield from _find_remainder("width", self.width, "num_heads", self.num_heads)
        yield from _find_remainder("image_size", self.image_size, "patch_size", self.patch_size)


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

    def find_problems(self) -> Iterator[str]:
        """Find sizes that do not divide each other."""
        yield from _find_remainder("width", self.width, "num_heads", self.num_heads)
        yield from _find_remainder("image_size", self.image_size, "patch_size", self.patch_size)


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


def _published_clip(
    image_size: int, patch_size: int, width: int, num_layers: int, num_heads: int, projection: int
) -> ClipArchitecture:
    return ClipArchitecture(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        projection_dim=projection,
    )


PUBLISHED_CLIP = {
    "ViT-B-32-quickgelu": _published_clip(224, 32, 768, 12, 12, 512),
    "ViT-B-16-quickgelu": _published_clip(224, 16, 768, 12, 12, 512),
    "ViT-L-14-quickgelu": _published_clip(224, 14, 1024, 24, 16, 768),
    "ViT-L-14-336-quickgelu": _published_clip(336, 14, 1024, 24, 16, 768),
    "ViT-L-14-worldwide-quickgelu": _published_clip(224, 14, 1024, 24, 16, 768),
    "ViT-H-14-quickgelu": _published_clip(224, 14, 1280, 32, 16, 1024),
    "ViT-H-14-378-quickgelu": _published_clip(378, 14, 1280, 32, 16, 1024),
    "ViT-H-14-worldwide-quickgelu": _published_clip(224, 14, 1280, 32, 16, 1024),
}
"""open_clip's plain vision transformers with QuickGELU, which OpenAI's weights were trained with.
Written out, as open_clip takes 5 s to import; a test compares them with its own."""


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

    def find_problems(self) -> Iterator[str]:
        """Find an architecture that is unknown, or has no weights on the hub."""
        if f"{self.architecture}-quickgelu" in PUBLISHED_CLIP:
            yield (
                f"architecture: {self.architecture!r} uses plain GELU - expected QuickGELU, which "
                f"OpenAI's weights were trained with - try '{self.architecture}-quickgelu'"
            )
        else:
            yield from _find_unknown(self.architecture, PUBLISHED_CLIP)
        yield from _find_unpublished(self.architecture, self.weights)

    @property
    def sizes(self) -> ClipArchitecture:
        """The network's sizes, looked up when it is named."""
        if isinstance(self.architecture, str):
            return PUBLISHED_CLIP[self.architecture]
        return self.architecture

    @property
    def feature_dim(self) -> int:
        """Width of the features: that of the class token."""
        return self.sizes.width


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

    def find_problems(self) -> Iterator[str]:
        """Find an architecture that is unknown, and an input of no whole patches."""
        unknown = [*_find_unknown(self.architecture, PUBLISHED_DINOV2)]
        yield from unknown
        yield from _find_unpublished(self.architecture, self.weights)
        if not unknown:
            patch_size = self.sizes.patch_size
            yield from _find_remainder("input_size", self.input_size, "patch_size", patch_size)

    @property
    def sizes(self) -> Dinov2Architecture:
        """The network's sizes, looked up when it is named."""
        if isinstance(self.architecture, str):
            return PUBLISHED_DINOV2[self.architecture]
        return self.architecture

    @property
    def feature_dim(self) -> int:
        """Width of the features: that of the class token."""
        return self.sizes.width


TeacherConfig = Annotated[ClipTeacherConfig | Dinov2TeacherConfig, Field(discriminator="kind")]
"""Settings of one teacher, told apart by `kind`."""


def _find_unknown(architecture: str | Config, published: Mapping[str, Config]) -> Iterator[str]:
    if isinstance(architecture, str) and architecture not in published:
        yield (
            f"architecture: {architecture!r} is unknown - expected one of {', '.join(published)} - "
            "or give sizes"
        )


def _find_unpublished(architecture: str | Config, weights: WeightsConfig) -> Iterator[str]:
    if weights.is_hub and not isinstance(architecture, str):
        yield (
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
