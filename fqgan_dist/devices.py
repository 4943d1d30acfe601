"""What a process computes with: its device, its threads, its workspaces."""

from __future__ import annotations

import os

import torch

from fqgan_dist.errors import ConfigError
from fqgan_dist.world import World


def select_device(name: str, world: World) -> torch.device:
    """Choose the device of a process.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: 'cuda', but torch sees no GPU in this process; use device=auto or device=cpu, "
            "or on a cluster reserve GPUs (ray.train.gpus, ray.pools.<stage>.gpus)"
        )
    return torch.device(name, world.local_rank) if name == "cuda" else torch.device(name)


def configure_torch(num_threads: int | None, *, is_deterministic: bool) -> None:
    """Set up torch in a process of a run, before it computes; None leaves its own threads."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if is_deterministic:
        # cuBLAS reads it at its first use; torch refuses deterministic products without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
