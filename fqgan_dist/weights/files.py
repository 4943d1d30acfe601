"""Files of weights: what is read is what was hashed, and holds tensors only."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fqgan_dist.errors import DataError, FqganError
from fqgan_dist.storage.disk_errors import clear_disk_errors, explain_if_of_disk

UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What torch's reader of pickles raises on damaged files, beside its own errors."""


def parse_safetensors(data: bytes) -> dict[str, Tensor]:
    """Read the bytes of a safetensors file.

    Raises:
        ValueError: they are none, or hold numbers of a kind that torch has not.
    """
    try:
        return safetensors.torch.load(data)
    except KeyError as error:
        raise ValueError(f"tensors of dtype {error}, which torch has not") from error
    except (SafetensorError, AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def load_safetensors_checked(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file whose bytes are the expected ones.

    The file is read once: what was hashed is what is parsed.

    Raises:
        DataError: the file is missing, has another sha256, or is not safetensors.
    """
    data = _read_checked(path, sha256)
    try:
        return parse_safetensors(data)
    except ValueError as error:
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
    except UNPICKLING_ERRORS as error:
        raise DataError(
            f"{path}: not a file of plain tensors ({error}) - expected a state dict as torch.save "
            "writes it - fetch the file again"
        ) from error
    if not is_state_dict(state):
        raise DataError(f"{path}: holds {type(state).__name__} - expected tensors by name")
    return dict(state)


def is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether a value that was read is tensors by name, and nothing else."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def download_torch_file(url: str, *, field: str) -> Path:
    """Download a file into torch.hub's folder unless it is there; return it.

    The URL's name ends in the first digits of the file's sha256, as torch.hub's do; `field` is the
    setting that can name a file instead.

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
        explained = explain_if_of_disk(error)
        if isinstance(explained, FqganError):
            raise explained from error
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
    with clear_disk_errors(path):
        path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


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
