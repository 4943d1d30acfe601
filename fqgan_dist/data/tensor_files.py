"""Chunks of named tensors as safetensors files below a fingerprint, written whole or not at all.

<prefix>/<fingerprint>/chunk-NNNNNN.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.weights.files import parse_safetensors


class TensorFiles:
    """The chunks of one piece of work."""

    def __init__(self, storage: Storage, prefix: str, fingerprint: str) -> None:
        """Name the files without touching them.

        Args:
            storage: of the run.
            prefix: folder.
            fingerprint: names everything that decides the content.
        """
        self.storage = storage
        self.folder = f"{prefix}/{fingerprint}"
        self.fingerprint = fingerprint

    def exists(self, chunk: int) -> bool:
        """Whether a chunk is there."""
        return self.storage.exists(self._path(chunk))

    def write(self, chunk: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a chunk."""
        data = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"fingerprint": self.fingerprint},
        )
        self.storage.write_bytes(self._path(chunk), data)

    def read(self, chunk: int) -> dict[str, Tensor]:
        """Read a chunk.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self._path(chunk)
        try:
            return parse_safetensors(self.storage.read_bytes(path))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.storage.uri(path)}: no such file; run the stage that writes it"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{self.storage.uri(path)}: not a safetensors file ({error}); delete it, and the "
                f"same command makes it again"
            ) from error

    def _path(self, chunk: int) -> str:
        return f"{self.folder}/chunk-{chunk:06d}.safetensors"
