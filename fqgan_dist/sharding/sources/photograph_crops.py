"""The built-in photographs as a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.listing import ListingBuilder, Place, SourceListing
from fqgan_dist.sharding.photographs import (
    PhotographsConfig,
    Split,
    crop_photograph,
    sample_photographs,
)


def list_photographs(split: str, config: PhotographsConfig) -> SourceListing:
    """List the crops of a split.

    Raises:
        ConfigError: there is no such split.
    """
    if split not in ("train", "val"):
        raise ConfigError(f"split: {split!r}: {BUILTIN_PHOTOGRAPHS} has 'train' and 'val'")
    builder = ListingBuilder(BUILTIN_PHOTOGRAPHS)
    crops = sample_photographs(
        cast(Split, split),
        image_size=config.image_size,
        crops_per_photograph=config.crops_per_photograph,
        seed=config.seed,
    )
    for _, name, data in crops:
        builder.add(name, Place(name, 0, len(data)))
    reader = CropReader(cast(Split, split), config)
    return builder.build("photographs", reader, is_shared_by_nodes=True)


@dataclass(frozen=True)
class CropReader:
    """Cuts the crop again that the listing was made with."""

    split: Split
    """Part of the photographs."""
    config: PhotographsConfig
    """How they are cropped."""

    def read(self, name: str, place: Place) -> bytes:  # noqa: ARG002
        """Implement `ImageReader`."""
        class_name, _, file_name = name.partition("/")
        number = int(file_name.removesuffix(".png").rpartition("_")[2])
        config = self.config
        return crop_photograph(class_name, number, self.split, config.image_size, config.seed)
