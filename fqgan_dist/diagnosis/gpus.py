"""This node's GPUs: what the driver lists, what torch can use, and whether they are free and sound.

What needs a GPU's context (a product, an all-reduce) runs in programs of their own: see
`collectives`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fqgan_dist.diagnosis.programs import Finished, run_programs
from fqgan_dist.diagnosis.verdict import Verdict, failed, judge, ok
from fqgan_dist.stages.config import RunConfig

GPUS = "GPUs"
# nvidia-smi takes tens of seconds where the driver's persistence mode is off.
QUERY_TIME_LIMIT_S = 60.0

_FIELDS = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
_BUSY_FRACTION = 0.1
_BF16_CAPABILITY = (8, 0)
_MIB_PER_GIB = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    name: str
    driver: str
    total_mib: int
    used_mib: int
    uncorrected_errors: int
    """Memory errors since the driver was loaded; 0 where the GPU does not count them."""


@dataclass(frozen=True)
class TorchView:
    """What torch can use."""

    capabilities: tuple[tuple[int, int], ...]
    """Compute capability of each GPU that it sees."""
    architectures: tuple[str, ...]
    """What it was compiled for: `sm_80`, `compute_120` ..."""
    cuda: str | None
    """CUDA version of the build; None: a build without it."""


def check_gpus(config: RunConfig | None) -> Verdict:
    """Describe the GPUs and find what keeps them from being used."""
    listed = list_gpus()
    view = TorchView(
        capabilities=tuple(
            torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
        ),
        architectures=tuple(torch.cuda.get_arch_list()),
        cuda=torch.version.cuda,
    )
    if not listed and not view.capabilities:
        return _judge_absence(config)
    return judge_gpus(listed, view, needs_bf16=_needs_bf16(config))


def list_gpus() -> list[Gpu]:
    """Ask the driver for its GPUs; [] where there is no driver.

    Raises:
        RuntimeError: the driver is there but does not answer.
    """
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        (finished,) = run_programs([command], time_limit_s=QUERY_TIME_LIMIT_S)
    except FileNotFoundError:
        return []
    return parse_gpus(finished)


def parse_gpus(finished: Finished) -> list[Gpu]:
    """Read nvidia-smi's answer.

    Raises:
        RuntimeError: it is an error.
    """
    if not finished.has_succeeded:
        reason = finished.output.strip() or finished.reason
        if "No devices were found" in reason:
            return []
        raise RuntimeError(f"nvidia-smi: {reason}; look at the driver (dmesg, Xid errors)")
    return [
        Gpu(
            name=name,
            driver=driver,
            total_mib=int(total),
            used_mib=int(used),
            # "[N/A]" where the GPU has no ECC memory.
            uncorrected_errors=int(errors) if errors.isdigit() else 0,
        )
        for name, driver, total, used, errors in csv.reader(
            finished.output.splitlines(), skipinitialspace=True
        )
    ]


def judge_gpus(listed: Sequence[Gpu], view: TorchView, *, needs_bf16: bool) -> Verdict:
    """Compare what the driver lists with what torch can use."""
    return judge(
        GPUS,
        _describe(listed, view),
        failures=list(_find_failures(listed, view, needs_bf16=needs_bf16)),
        warnings=list(_find_warnings(listed, view)),
    )


def _judge_absence(config: RunConfig | None) -> Verdict:
    if config is not None and config.device == "cuda" and config.execution == "local":
        return failed(GPUS, "none on this machine", "device: cuda needs one; use device=auto")
    return ok(GPUS, "none on this node; what runs here runs on the CPU")


def _describe(listed: Sequence[Gpu], view: TorchView) -> str:
    if not listed:
        return f"torch sees {len(view.capabilities)}, nvidia-smi is not installed"
    kinds = Counter(f"{gpu.name} {gpu.total_mib / _MIB_PER_GIB:.0f} GiB" for gpu in listed)
    capabilities = sorted({f"{major}.{minor}" for major, minor in view.capabilities})
    return (
        ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        + f"; driver {listed[0].driver}, torch's CUDA {view.cuda}, compute capability "
        + (", ".join(capabilities) or "unknown")
    )


def _find_failures(listed: Sequence[Gpu], view: TorchView, *, needs_bf16: bool) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not view.capabilities:
        if view.cuda is None:
            return ["torch is a build without CUDA: install the default one (pip install torch)"]
        if visible is not None:
            return [f"torch sees none of them: CUDA_VISIBLE_DEVICES is {visible!r}; unset it"]
        return [f"torch sees none of them: install a driver that supports CUDA {view.cuda}"]
    problems = [
        f"torch is not compiled for compute capability {major}.{minor}: install a build that is"
        for major, minor in sorted(set(view.capabilities))
        if not is_supported((major, minor), view.architectures)
    ]
    if needs_bf16 and min(view.capabilities) < _BF16_CAPABILITY:
        problems.append("bf16 needs compute capability 8.0: set training.precision=fp32")
    broken = [str(index) for index, gpu in enumerate(listed) if gpu.uncorrected_errors]
    if broken:
        problems.append(
            f"GPU {', '.join(broken)} has uncorrected memory errors: reset or replace it"
        )
    return problems


def _find_warnings(listed: Sequence[Gpu], view: TorchView) -> list[str]:
    problems = []
    if len({gpu.name for gpu in listed}) > 1:
        problems.append("different GPUs: the slowest sets the pace, and bits differ between them")
    busy = [
        f"{index} ({gpu.used_mib / _MIB_PER_GIB:.1f} GiB)"
        for index, gpu in enumerate(listed)
        if gpu.used_mib > _BUSY_FRACTION * gpu.total_mib
    ]
    if busy:
        problems.append(f"memory of GPU {', '.join(busy)} is in use: see who runs there")
    if listed and view.capabilities and len(view.capabilities) < len(listed):
        problems.append(
            f"torch sees {len(view.capabilities)} of {len(listed)}: look at CUDA_VISIBLE_DEVICES"
        )
    return problems


def is_supported(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Tell whether code for these architectures runs on a compute capability.

    Machine code (`sm_`) runs on GPUs of its major version and at least its minor one, intermediate
    code (`compute_`) on all later ones; code for `sm_90a` on that GPU only.
    """
    return any(_runs_on(architecture, capability) for architecture in architectures)


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if match is None:
        return False
    kind, major, minor, suffix = match.groups()
    built = (int(major), int(minor))
    if suffix == "a":
        return capability == built
    if kind == "sm" or suffix == "f":
        return capability[0] == built[0] and capability >= built
    return capability >= built


def _needs_bf16(config: RunConfig | None) -> bool:
    if config is None or config.device == "cpu":
        return False
    trainings = (config.tokenizer.training, config.autoregressive.training)
    return any(training.precision == "bf16" for training in trainings)
