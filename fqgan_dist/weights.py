"""Weights of frozen, pretrained networks: where they come from, and how they are checked and named.

Three sources, and never a silent change from one to another: `hub` (the network's own library
downloads it), `random` (seeded, said in the log), or a safetensors file whose sha256 can be pinned.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from fqgan_dist.config import Config
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.randomness import Key, numpy_generator
from fqgan_dist.storage.names import holds_credentials, is_remote

logger = logging.getLogger(__name__)

_HUB = "hub"
_RANDOM = "random"
_NAMED_KEYS = 3


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
        if holds_credentials(source):
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
        if is_remote(self.source):
            raise ConfigError(
                f"weights.source: {self.source!r} is remote - expected a local file here - stage "
                "it first and pass weights_path"
            )
        return Path(self.source)


def load_safetensors_checked(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file whose bytes are the expected ones.

    The file is read once: what was hashed is what is parsed.

    Raises:
        DataError: the file is missing, has another sha256, or is not safetensors.
    """
    data = _read_checked(path, sha256)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise DataError(
            f"{path}: not a safetensors file ({error}) - expected weights saved by safetensors - "
            "fetch the file again"
        ) from error


def load_torch_checked(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a `.pth` file that holds tensors only; used for what a hub has in no other format.

    Raises:
        DataError: the file is missing, has another sha256, or holds anything but tensors by name.
    """
    _read_checked(path, sha256)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: not a file of plain tensors ({error})") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: holds {type(state).__name__} - expected tensors by name")
    return dict(state)


def download_torch_file(url: str, *, field: str) -> Path:
    """Download a file into torch.hub's folder unless it is there; return it.

    Args:
        url: whose name ends in the first digits of the file's sha256, as torch.hub's do.
        field: the setting that can name a file instead, for the error.

    Raises:
        DataError: the address cannot be reached, or the file is not the published one.
    """
    name = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    hash_prefix = name.removesuffix(".pth").rsplit("-", 1)[-1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{url}: cannot be downloaded ({error}) - expected access to the internet - run "
            f"`fqgan weights fetch CONFIG to=DIR` where there is access, and set {field} to the "
            "file it makes"
        ) from error
    return path


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write weights as one safetensors file; return its sha256 in hexadecimal."""
    data = safetensors.torch.save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    )
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy weights into a network that has exactly these names and shapes.

    Raises:
        DataError: names are missing or unknown, or a shape differs; the first few are named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_same_network(
        source=source,
        missing=expected.keys() - found.keys(),
        unexpected=found.keys() - expected.keys(),
        mismatched=[
            f"{name} is {found[name]}, expected {expected[name]}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        ],
    )
    network.load_state_dict(dict(tensors))


def check_same_network(
    *, source: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]
) -> None:
    """Raise a DataError that names what differs between a file and the configured network."""
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED_KEYS])}{_dots(names)})"
        for what, names in (
            ("tensors are missing", sorted(missing)),
            ("tensors are unknown", sorted(unexpected)),
            ("tensors have another shape", sorted(mismatched)),
        )
        if names
    ]
    if problems:
        raise DataError(
            f"{source}: not the weights of the configured network - {'; '.join(problems)} - change "
            "the architecture or the file"
        )


def _dots(names: Sequence[str]) -> str:
    return ", ..." if len(names) > _NAMED_KEYS else ""


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and values.

    The same for one network, whatever file it came from.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draw_normal(shape: Sequence[int], *key: Key) -> Tensor:
    """Draw standard normal float32 numbers for a key.

    NumPy's generator, since torch's normal numbers differ in the last bits between kinds of CPU,
    and the hash of random weights must be one on all nodes.
    """
    numbers = numpy_generator(*key).standard_normal(math.prod(shape), dtype=np.float32)
    return torch.from_numpy(numbers).reshape(tuple(shape))


def warn_random_weights(network: str, seed: int) -> None:
    """Say in the log that results of this network mean nothing outside this run."""
    logger.warning(
        "%s: random weights (seed %d): not comparable with published numbers", network, seed
    )


def _read_checked(path: Path, sha256: str | None) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: weights cannot be read ({error.strerror}) - name a file"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{path}: sha256 is {found} - expected {sha256} - fetch the file again or correct "
            "sha256"
        )
    return data
