"""Settings of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.storage.uri import Location
from fqgan_dist.weights.config import WeightsConfig

FEATURE_DIM = 2048
"""Size of the network's features."""
PUBLISHED_RESOLUTION = 299
"""Input side of the published network, pixels."""
SMALLEST_RESOLUTION = 75
"""Below this the last blocks have no pixel left."""


class InceptionConfig(Config):
    """Settings of the evaluator's network."""

    weights: WeightsConfig
    """`hub` takes torch-fidelity's file; a file holds the same tensors as safetensors."""
    resolution: int = Field(default=PUBLISHED_RESOLUTION, ge=SMALLEST_RESOLUTION, le=1024)
    """Side that images are resized to, pixels; other than 299 it is another evaluator."""


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
    adm_reference: Location | None = None
    """ADM's .npz file (path or s3:// URI; `mu`, `sigma`) that gFID is measured against, as in the
    paper; precision and recall stay against training images. None: the training images."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide features and per-image scores."""
        return self.model_dump(mode="json", exclude={"adm_reference"})

    def find_problems(self) -> Iterator[str]:
        """Find an ADM reference that was made by another network."""
        if self.adm_reference is None:
            return
        inception = self.inception
        if inception.weights.source == "random" or inception.resolution != PUBLISHED_RESOLUTION:
            yield (
                f"adm_reference: {self.adm_reference!r} was made by the published Inception "
                f"network at {PUBLISHED_RESOLUTION} pixels, but inception has weights.source "
                f"{inception.weights.source!r} and resolution {inception.resolution}; use that "
                "network, or adm_reference: null"
            )
