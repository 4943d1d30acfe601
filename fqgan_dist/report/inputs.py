"""What a report is made of: plain values and images, so that building it reads no storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fqgan_dist.telemetry.metrics import Record
from fqgan_dist.telemetry.summary import StageSummary, parse_summary

Images = NDArray[np.uint8]
"""Images of one size, (n, H, W, 3) uint8."""


@dataclass(frozen=True, kw_only=True)
class ReportInputs:
    """Everything that the report shows; parts that a run does not have stay empty.

    Raises:
        ValueError: images are not (n, H, W, 3) uint8, or do not belong together.
    """

    run_name: str
    summary: Mapping[str, Any]
    """Content of `summary.json`: stage -> {state, seconds, metrics}."""
    config_yaml: str
    environment: Mapping[str, Any]
    """Content of `environment.json`."""
    metrics: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    """Stage -> records of its `metrics.jsonl`."""
    originals: Images | None = None
    """Validation images, (n, H, W, 3)."""
    reconstructions: Images | None = None
    """The tokenizer's reconstruction of each original, (n, H, W, 3)."""
    single_codebook: Mapping[str, Images] = field(default_factory=dict)
    """Codebook name -> reconstructions from its codes alone, (n, H, W, 3) (paper, Fig. 3)."""
    samples: Mapping[str, Images] = field(default_factory=dict)
    """Class name -> generated images of the class, (m, H, W, 3)."""
    notes: Sequence[str] = ()
    """What a reader must know before comparing numbers, for example that weights are random."""

    def __post_init__(self) -> None:
        for name, images in self._named_images().items():
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise ValueError(
                    f"{name}: shape {images.shape}, {images.dtype}; expected (n, H, W, 3) uint8"
                )
        for name, images in self._compared_images().items():
            if self.originals is None or images.shape != self.originals.shape:
                expected = None if self.originals is None else self.originals.shape
                raise ValueError(f"{name}: shape {images.shape}; expected originals' {expected}")
        sizes = {name: images.shape[1:3] for name, images in self.samples.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"samples: image sizes differ ({sizes}); expected one size")

    @property
    def stages(self) -> dict[str, StageSummary]:
        return parse_summary(self.summary)

    @property
    def codebook_names(self) -> list[str]:
        """Names of the codebooks, in config order, as far as the inputs tell."""
        tokenizer = self.stages.get("tokenizer")
        named = [*self.single_codebook, *(tokenizer.group("perplexity") if tokenizer else ())]
        return list(dict.fromkeys(named))

    def _compared_images(self) -> dict[str, Images]:
        compared = {f"single_codebook {name!r}": v for name, v in self.single_codebook.items()}
        if self.reconstructions is not None:
            compared["reconstructions"] = self.reconstructions
        return compared

    def _named_images(self) -> dict[str, Images]:
        named = self._compared_images()
        named |= {f"samples of {name!r}": images for name, images in self.samples.items()}
        if self.originals is not None:
            named["originals"] = self.originals
        return named
