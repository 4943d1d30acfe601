"""Where weights come from: three sources, and never a silent change from one to another.

`hub` (the network's own library downloads it), `random` (seeded, said in the log), or a safetensors
file whose sha256 can be pinned.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fqgan_dist.config import Config
from fqgan_dist.errors import ConfigError

_HUB = "hub"
_RANDOM = "random"


class WeightsConfig(Config):
    """Where the weights of one frozen network come from."""

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
        if not source.endswith(".safetensors"):
            raise ValueError(
                f"{source!r} is no weights source - expected 'hub', 'random' or a path or URI that "
                "ends in .safetensors - `fqgan weights fetch CONFIG to=DIR` makes such files of a "
                "hub's weights"
            )
        if "@" in urlsplit(source).netloc:
            raise ValueError(
                "the URI holds credentials - expected none - give them in the environment instead"
            )
        return source

    @model_validator(mode="after")
    def _check_effect(self) -> WeightsConfig:
        if self.is_random and self.sha256 is not None:
            raise ValueError("sha256: random weights have no file to check - remove it")
        if not self.is_random and self.seed != 0:
            raise ValueError(f"seed: {self.seed} has no effect on {self.source!r} - remove it")
        return self

    @property
    def is_hub(self) -> bool:
        """Whether the network's own library downloads the weights."""
        return self.source == _HUB

    @property
    def is_random(self) -> bool:
        """Whether the weights are seeded random numbers."""
        return self.source == _RANDOM

    @property
    def is_file(self) -> bool:
        """Whether the weights are a safetensors file, local or remote."""
        return not (self.is_hub or self.is_random)

    def find_file(self, staged: Path | None) -> Path:
        """Name the local file of a `path or URI` source.

        Args:
            staged: the local copy that the caller made of a remote file; None for a local path.

        Raises:
            ConfigError: the source is a URI and no local copy was made.
        """
        if staged is not None:
            return staged
        if "://" in self.source:
            raise ConfigError(
                f"weights.source: {self.source!r} is remote - expected a local file here - stage "
                "it first and pass weights_path"
            )
        return Path(self.source)


class FetchTarget(Config):
    """Where the weights shall go."""

    to: str = Field(min_length=1)
    """A directory or `s3://bucket/prefix`; made if it is missing."""
