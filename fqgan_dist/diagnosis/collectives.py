"""Communication between the ranks of this node, as a training uses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fqgan_dist.diagnosis.programs import Finished, import_path, python_module, run_programs
from fqgan_dist.diagnosis.verdict import Verdict, failed, judge
from fqgan_dist.storage.scratch import ScratchFolder

COLLECTIVES = "NCCL and gloo"
# Twice torch's own limit of 60 s, after which the reason is known, and the imports.
RANKS_TIME_LIMIT_S = 140.0
TIME_LIMIT_S = RANKS_TIME_LIMIT_S + 10
# What is added up, by backend.
SIZE_BYTES = {"nccl": 256 * 2**20, "gloo": 4 * 2**20}

_CPU_RANKS = 2
# Well below what PCIe gives; the NVLink of an A100 node gives 230, four such nodes 30
# (github.com/NVIDIA/nccl/issues/527).
_SLOW_NCCL_GB_PER_S = 5.0
_PROGRAM = "fqgan_dist.diagnosis.all_reduce"


def check_collectives() -> Verdict:
    """All-reduce between this node's GPUs (nccl), or between two processes (gloo) without GPUs."""
    gpus = torch.cuda.device_count()
    backend, ranks = ("nccl", gpus) if gpus else ("gloo", _CPU_RANKS)
    with ScratchFolder("doctor") as folder:
        # A file, unlike a port, cannot be taken by somebody else between choice and use.
        init_method = (Path(folder) / "store").as_uri()
        finished = run_ranks(backend, range(ranks), ranks, init_method)
    return judge_all_reduce(COLLECTIVES, backend, finished)


def run_ranks(
    backend: str, ranks: Sequence[int], world_size: int, init_method: str
) -> list[Finished]:
    """Run this node's ranks of an all-reduce, with nccl the i-th of them on GPU i.

    They meet at `init_method`, torch's `file://` or `tcp://` URL.
    """
    size = str(SIZE_BYTES[backend])
    commands = [
        python_module(_PROGRAM, backend, str(rank), str(world_size), init_method, str(local), size)
        for local, rank in enumerate(ranks)
    ]
    return run_programs(
        commands, time_limit_s=RANKS_TIME_LIMIT_S, environments=[import_path()] * len(commands)
    )


def judge_all_reduce(check: str, backend: str, finished: Sequence[Finished]) -> Verdict:
    """Read the answers of all ranks, in their order."""
    ranks = len(finished)
    lost = [(rank, each.reason) for rank, each in enumerate(finished) if not each.has_succeeded]
    if lost:
        rank, reason = lost[0]
        return failed(
            check,
            f"{backend} all-reduce of {ranks} ranks: rank {rank}: {reason}",
            _ADVICE[backend],
        )
    facts = json.loads(finished[0].output.splitlines()[-1])
    finding = f"{facts['library']}: all-reduce of {ranks} ranks is right"
    if ranks == 1:
        return judge(check, f"{finding} (one GPU: nothing moved)", failures=[], warnings=[])
    # Each rank sends and receives 2 (n - 1) / n of the data: NCCL's "bus bandwidth".
    bandwidth = 2 * (ranks - 1) / ranks * SIZE_BYTES[backend] / facts["seconds"] / 1e9
    warnings = []
    if backend == "nccl" and bandwidth < _SLOW_NCCL_GB_PER_S:
        warnings.append(
            f"slower than {_SLOW_NCCL_GB_PER_S:g} GB/s: look at NCCL_DEBUG=INFO, "
            "`nvidia-smi topo -m` and the size of /dev/shm"
        )
    return judge(check, f"{finding}, {bandwidth:.1f} GB/s", failures=[], warnings=warnings)


_ADVICE = {
    "nccl": "repeat with NCCL_DEBUG=INFO; common causes: a small /dev/shm, other users of the GPUs",
    "gloo": "name the network interface in GLOO_SOCKET_IFNAME, or make the host name resolve",
}
