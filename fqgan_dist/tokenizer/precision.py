"""True fp32 arithmetic, whatever autocast and TF32 settings surround it.

bf16 or TF32 dot products pick wrong codes: 73 % of them in bf16 when the codes are clustered, as
early in training (reference/performance.md, section 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run a block without autocast and with IEEE fp32 matrix products.

    The flags are those of the process; they come back as they were.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue] mkldnn.matmul has no stub
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with _no_autocast(device.type):
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    # The meta device, on which dry runs and tests build full-size models, has no autocast to leave.
    if not torch.amp.is_autocast_available(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


def rows_per_block(row_length: int, device: torch.device) -> int:
    """Choose how many rows of a (rows, row_length) fp32 matrix exist at a time."""
    # 1 MiB stays in a CPU's cache (9x faster than the whole matrix at V = 16384, measured); 64 MiB
    # fill a GPU.
    elements = 2**24 if device.type == "cuda" else 2**18
    return max(1, elements // row_length)
