"""What the node gives a process: CPUs, memory, shared memory, disks, open files."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

import torch

from fqgan_dist.diagnosis.storage import find_existing, judge_space
from fqgan_dist.diagnosis.verdict import Verdict, failed, judge, warning
from fqgan_dist.stages.config import RunConfig

CPUS, MEMORY, SHARED_MEMORY = "CPUs", "memory", "shared memory"
TEMPORARY, CACHES, OPEN_FILES = "temporary folder", "caches", "open files"

_SHARED_MEMORY_FOLDER = Path("/dev/shm")
_GIB = 2**30
_LEAST_SHARED_GIB, _LITTLE_SHARED_GIB = 0.25, 2.0
_LEAST_MEMORY_GIB, _LITTLE_MEMORY_GIB = 1.0, 4.0
_LEAST_FILES, _FEW_FILES = 256, 4096
# Ray stops writing to a disk that is fuller (RAY_local_fs_capacity_threshold).
_FULL_FRACTION = 0.95
_PROBE_BYTES = 2**20
_CGROUP = Path("/sys/fs/cgroup")


def check_cpus(config: RunConfig | None) -> Verdict:
    usable, gpus = count_cpus(), torch.cuda.device_count()
    return judge_cpus(usable, gpus, loader_workers=config.data.loader_workers if config else 0)


def judge_cpus(usable: float, gpus: int, *, loader_workers: int) -> Verdict:
    """Compare CPUs with the processes that a node with these GPUs runs."""
    needed = gpus * (1 + loader_workers)
    warnings = []
    if usable < needed:
        warnings.append(
            f"{gpus} train workers with {loader_workers} loader workers each want {needed}: lower "
            f"data.loader_workers, or use a node with more CPUs"
        )
    return judge(CPUS, f"{usable:g} usable", failures=[], warnings=warnings)


def count_cpus() -> float:
    """Return how many CPUs the affinity and the container's quota allow."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _read_words(_CGROUP / "cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        allowed = min(allowed, int(quota[0]) / int(quota[1]))
    return allowed


def check_memory() -> Verdict:
    total, available = read_memory()
    return judge_memory(total, available)


def judge_memory(total_bytes: int, available_bytes: int) -> Verdict:
    """Compare memory with what one process of a run takes."""
    available = available_bytes / _GIB
    finding = f"{available:.1f} of {total_bytes / _GIB:.1f} GiB available"
    return judge(
        MEMORY,
        finding,
        failures=["end other processes"] if available < _LEAST_MEMORY_GIB else [],
        warnings=["small for a training process"]
        if _LEAST_MEMORY_GIB <= available < _LITTLE_MEMORY_GIB
        else [],
    )


def read_memory() -> tuple[int, int]:
    """Return total and available bytes, within the container's limit."""
    facts = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (
            line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines()
        )
    }
    total, available = facts["MemTotal"], facts["MemAvailable"]
    limit = _read_words(_CGROUP / "memory.max")
    used = _read_words(_CGROUP / "memory.current")
    if limit and used and limit[0] != "max":
        total = min(total, int(limit[0]))
        available = min(available, int(limit[0]) - int(used[0]))
    return total, available


def check_shared_memory() -> Verdict:
    """Look at /dev/shm, which NCCL, loader processes and Ray's object store share."""
    if not _SHARED_MEMORY_FOLDER.is_dir():
        return warning(SHARED_MEMORY, f"no {_SHARED_MEMORY_FOLDER}", "mount a tmpfs there")
    usage = shutil.disk_usage(_SHARED_MEMORY_FOLDER)
    return judge_shared_memory(usage.total, usage.free)


def judge_shared_memory(total_bytes: int, free_bytes: int) -> Verdict:
    """Compare shared memory with what its users take."""
    free = free_bytes / _GIB
    finding = f"{free:.2f} of {total_bytes / _GIB:.2f} GiB free in {_SHARED_MEMORY_FOLDER}"
    advice = ["give the container more: --shm-size=16g, or a Memory emptyDir at /dev/shm"]
    return judge(
        SHARED_MEMORY,
        finding,
        failures=advice if free < _LEAST_SHARED_GIB else [],
        warnings=advice if _LEAST_SHARED_GIB <= free < _LITTLE_SHARED_GIB else [],
    )


def check_temporary_folder() -> Verdict:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return failed(TEMPORARY, str(error), "set TMPDIR to a folder that can be written")
    return check_folder(TEMPORARY, folder, variable="TMPDIR")


def check_caches() -> Verdict:
    """Write to the folders where weights are cached, and look at their free space."""
    verdicts = [
        check_folder(CACHES, path, variable=variable) for variable, path in find_caches().items()
    ]
    # One line for all: the worst of them, or the first.
    order = ("ok", "warning", "failed")
    return max(verdicts, key=lambda verdict: order.index(verdict.status))


def find_caches() -> dict[str, Path]:
    """Return the caches' folders by the variable that moves each."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "XDG_CACHE_HOME": base / "fqgan_dist",
        "HF_HOME": Path(os.environ.get("HF_HOME") or base / "huggingface"),
        "TORCH_HOME": Path(os.environ.get("TORCH_HOME") or base / "torch"),
    }


def check_folder(check: str, path: Path, *, variable: str) -> Verdict:
    """Write a file to a folder, or to the one above it that exists, and look at its free space."""
    folder = find_existing(path)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return failed(
            check,
            f"{path}: cannot be written ({error.strerror})",
            f"set {variable} to a folder that can be written, on a disk with space",
        )
    usage = shutil.disk_usage(folder)
    if usage.used > _FULL_FRACTION * usage.total:
        return warning(
            check,
            f"{path}: its disk is {usage.used / usage.total:.0%} full",
            f"free space: over {_FULL_FRACTION:.0%} Ray refuses to write; or move {variable}",
        )
    return judge_space(check, str(path), usage.free)


def check_open_files() -> Verdict:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(soft, hard)


def judge_open_files(soft: int, hard: int) -> Verdict:
    """Compare the limit with what Ray and the loaders open."""
    limit = float("inf") if soft == resource.RLIM_INFINITY else soft
    advice = ["raise it: ulimit -n 65536 (docker: --ulimit nofile=65536:65536)"]
    return judge(
        OPEN_FILES,
        f"{limit:g} per process" + (f" (may be raised to {hard})" if soft < hard else ""),
        failures=advice if limit < _LEAST_FILES else [],
        warnings=advice if _LEAST_FILES <= limit < _FEW_FILES else [],
    )


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []  # no such limit on this system
