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

_SHOWN_NAMES = 10
_ADVICE = "delete it, and the same command makes it again"


class _ChunkTensors(dict[str, Tensor]):
    """Tensors of a chunk by name; to ask for one that is not there names the file."""

    def __init__(self, tensors: Mapping[str, Tensor], uri: str) -> None:
        super().__init__(tensors)
        self._uri = uri

    def __missing__(self, name: str) -> Tensor:
        raise DataError(
            f"{self._uri}: has no tensor {name!r}, only {sorted(self)[:_SHOWN_NAMES]}; {_ADVICE}"
        )


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
        """Read a chunk; to ask it for a tensor that it has not raises a DataError, too.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self._path(chunk)
        uri = self.storage.uri(path)
        try:
            return _ChunkTensors(parse_safetensors(self.storage.read_bytes(path)), uri)
        except FileNotFoundError as error:
            raise DataError(f"{uri}: no such file; run the stage that writes it") from error
        except ValueError as error:
            raise DataError(f"{uri}: not a safetensors file ({error}); {_ADVICE}") from error

    def _path(self, chunk: int) -> str:
        return f"{self.folder}/chunk-{chunk:06d}.safetensors"
