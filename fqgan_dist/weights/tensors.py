"""Weights as tensors by name: copied into a network, hashed, drawn at random."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fqgan_dist.errors import DataError
from fqgan_dist.randomness import Key, numpy_generator

logger = logging.getLogger(__name__)

_NAMED_KEYS = 3


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
        # A file may give any stride to an only element, with which it cannot be seen as bytes.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
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
