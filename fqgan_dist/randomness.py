"""Randomness keyed by what it is for, never by rank, worker or time.

A step's randomness is keyed by (seed, step, micro-batch), a sample's by (seed, key, view), so that
any layout of processes draws the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Key = int | str | np.integer[Any]

_SEPARATOR = "\x1f"


def derive_seed(*key: Key) -> int:
    """Hash a key to 63 bits; equal on every machine, Python version and process.

    Raises:
        TypeError: a part is neither an int nor a str.
    """
    text = _SEPARATOR.join(_describe(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*key: Key) -> np.random.Generator:
    """Build a counter-based NumPy generator for a key."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*key)))


def torch_generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """Build a torch generator for a key on a device."""
    return torch.Generator(device).manual_seed(derive_seed(*key))


@contextmanager
def keyed_torch_rng(*key: Key, device: torch.device) -> Iterator[None]:
    """Seed torch's default generators for a block, for what takes no generator (dropout).

    The generators' former states come back afterwards.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(*key))
        yield


def _describe(part: Key) -> str:
    # The type is part of the text: derive_seed(1) and derive_seed("1") are different streams.
    if isinstance(part, str):
        return f"str:{part.replace(_SEPARATOR, 2 * _SEPARATOR)}"
    if isinstance(part, bool) or not isinstance(part, int | np.integer):
        raise TypeError(f"key part {part!r} is a {type(part).__name__}: expected int or str")
    return f"int:{part}"  # of NumPy's integers too: a row number is the same key from any source
