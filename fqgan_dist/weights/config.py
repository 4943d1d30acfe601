"""Where weights come from: three sources, and never a silent change from one to another.

`hub` (the network's own library downloads it), `random` (seeded, said in the log), or a safetensors
file whose sha256 can be pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from fqgan_dist.config import Config
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import is_remote
from fqgan_dist.storage.uri import Location, check_no_credentials, parse_location

_HUB = "hub"
_RANDOM = "random"


class WeightsConfig(Config):
    """Where the weights of one network come from."""

    source: str
    """`hub`, `random`, or the path or URI of a `.safetensors` file."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected sha256 of the file in hexadecimal; None accepts any file."""
    seed: int = 0
    """Seed of `random` weights; the only setting they have."""

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        if source in (_HUB, _RANDOM):
            return source
        check_no_credentials(source)
        if not source.endswith(".safetensors"):
            raise ValueError(
                f"{source!r} is no weights source - expected 'hub', 'random' or a path or URI that "
                "ends in .safetensors - `fqgan weights fetch CONFIG to=DIR` makes such files of a "
                "hub's weights"
            )
        return parse_location(source)

    def find_problems(self) -> Iterator[str]:
        if self.is_random and self.sha256 is not None:
            yield "sha256: random weights have no file to check - remove it"
        if not self.is_random and self.seed != 0:
            yield f"seed: {self.seed} has no effect on {self.source!r} - remove it"

    @property
    def is_hub(self) -> bool:
        """Whether the network's own library downloads the weights."""
        return self.source == _HUB

    @property
    def is_random(self) -> bool:
        return self.source == _RANDOM

    @property
    def is_file(self) -> bool:
        """Whether the weights are a safetensors file, local or remote."""
        return not (self.is_hub or self.is_random)

    def identity(self) -> dict[str, Any]:
        """Name the weights by what decides them: a file of a known hash may be moved."""
        return {"sha256": self.sha256} if self.is_file and self.sha256 else self.model_dump()

    def find_file(self, staged: Path | None) -> Path:
        """Name the local file of a `path or URI` source: the local copy of a remote one.

        Raises:
            ConfigError: the source is a URI and no local copy was made.
        """
        if staged is not None:
            return staged
        if is_remote(self.source):
            raise ConfigError(
                f"weights.source: {self.source!r} is remote - expected a local file here - stage "
                "it first and pass weights_path"
            )
        return Path(self.source)


def _check_is_file(weights: WeightsConfig) -> WeightsConfig:
    if not weights.is_file:
        raise ValueError(
            f"source: {weights.source!r} holds no model of this project - expected a .safetensors "
            "file as `fqgan checkpoints export` writes it (a path or URI) - a model that starts "
            "from random weights needs no init_from"
        )
    return weights


InitialWeights = Annotated[WeightsConfig, AfterValidator(_check_is_file)]
"""Weights that a training starts from."""


class FetchTarget(Config):
    """Where the weights shall go."""

    to: Location
    """A directory or `s3://bucket/prefix`; made if it is missing."""
