r"""One rank of a small all-reduce: is the sum right, and how fast is it?

    python -m fqgan_dist.diagnosis.all_reduce \
        BACKEND RANK WORLD_SIZE INIT_METHOD LOCAL_RANK SIZE_BYTES

Its last line of output is `{"seconds": per all-reduce, "library": version}`. With nccl it takes the
GPU of LOCAL_RANK, on which a matrix product is checked before. Started by `collectives`.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.cuda import nccl

_TIMEOUT_S = 60.0
_WARM_UP, _REPEATS = 2, 5
_PRODUCT_SIZE = 1024
_BYTES_PER_NUMBER = 4


def main(arguments: list[str]) -> None:
    """Join the other ranks, add numbers, and report."""
    backend, rank, world_size, init_method, local_rank, size_bytes = arguments
    device = torch.device("cuda", int(local_rank)) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        check_product(device)
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=int(rank),
        world_size=int(world_size),
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    check_sum(device)
    seconds = time_all_reduce(device, int(size_bytes) // _BYTES_PER_NUMBER)
    dist.destroy_process_group()
    facts = {"seconds": seconds, "library": _describe_library(backend)}
    sys.stdout.write(json.dumps(facts) + "\n")


def check_product(device: torch.device) -> None:
    """Multiply matrices whose product is known.

    Raises:
        RuntimeError: the result is wrong.
    """
    # Small whole numbers: exact in bf16, and so are their sums in the float32 accumulator.
    rows = torch.arange(_PRODUCT_SIZE, device=device).remainder(8).to(torch.bfloat16)
    product = rows.repeat(_PRODUCT_SIZE, 1) @ torch.eye(
        _PRODUCT_SIZE, dtype=torch.bfloat16, device=device
    )
    if not torch.equal(product[-1], rows):
        raise RuntimeError(f"{device}: a matrix product is wrong; the GPU is defective")


def check_sum(device: torch.device) -> None:
    """Add numbers whose sum is known.

    Raises:
        RuntimeError: the sum is wrong.
    """
    world_size = dist.get_world_size()
    expected = world_size * (world_size + 1) // 2
    values = torch.full((_PRODUCT_SIZE,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    if not bool((values == expected).all()):
        raise RuntimeError(f"the sum over {world_size} ranks is wrong: expected {expected}")


def time_all_reduce(device: torch.device, count: int) -> float:
    """Add tensors of `count` float32 zeros several times; return the seconds of one addition."""
    values = torch.zeros(count, device=device)
    start = 0.0
    for number in range(_WARM_UP + _REPEATS):
        if number == _WARM_UP:
            _synchronize(device)
            start = time.perf_counter()
        dist.all_reduce(values)
    _synchronize(device)
    return (time.perf_counter() - start) / _REPEATS


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe_library(backend: str) -> str:
    if backend != "nccl":
        return backend
    return "nccl " + ".".join(map(str, nccl.version()))


if __name__ == "__main__":
    main(sys.argv[1:])
