"""One value for tensors by name, whoever stored them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest_tensors(tensors: Mapping[str, Any]) -> str:
    """Hash whole tensors: name, dtype, shape and bytes, in the order of names."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        assert isinstance(tensor, Tensor), f"{name} is not whole"
        tensor = tensor.detach().contiguous()
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()
