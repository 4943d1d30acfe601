"""Describe the software and hardware of a run, for `environment.json`.

Only what is named here is recorded: no environment variables, no user or host names, no URLs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fqgan_dist

# Distributions whose versions decide results or formats.
PACKAGES = (
    "fqgan-dist",
    "torch",
    "torchvision",
    "deepspeed",
    "ray",
    "webdataset",
    "s3fs",
    "pyarrow",
    "transformers",
    "open_clip_torch",
    "torch-fidelity",
    "lpips",
    "numpy",
    "pillow",
    "pydantic",
    "safetensors",
)

_GIT_TIMEOUT_S = 10


def collect_environment() -> dict[str, Any]:
    """Collect versions, source revision and hardware as a JSON-able dict.

    `git` is None outside a repository, a package's version None where it is not installed; the
    memory of `gpus` is in GiB.
    """
    return {
        "git": describe_source(Path(fqgan_dist.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": _describe_gpus(),
        "packages": {name: _find_version(name) for name in PACKAGES},
    }


def describe_source(repository: Path) -> dict[str, Any] | None:
    """Name the commit of a checkout and whether tracked files differ from it: `{commit, modified}`.

    None where the directory is not the root of a repository with a commit, or git is missing.
    """
    # An installed package may lie inside somebody else's repository: only our own root counts.
    root = _run_git(repository, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != repository.resolve():
        return None
    commit = _run_git(repository, "rev-parse", "HEAD")
    changes = _run_git(repository, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "modified": bool(changes)}


def _run_git(directory: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)}
        for device in devices
    ]
