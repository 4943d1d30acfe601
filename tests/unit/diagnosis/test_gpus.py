"""Judgements on GPUs; none is needed, as a driver's answers are texts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fqgan_dist.config import load_config
from fqgan_dist.diagnosis.gpus import (
    Gpu,
    TorchView,
    check_gpus,
    is_supported,
    judge_gpus,
    list_gpus,
)
from fqgan_dist.stages.config import RunConfig

TINY = Path(__file__).resolve().parents[2] / "support" / "tiny.yaml"
A100 = Gpu("NVIDIA A100-SXM4-80GB", "580.65.06", total_mib=81920, used_mib=4, uncorrected_errors=0)
EIGHT = TorchView(
    capabilities=((8, 0),) * 8, architectures=("sm_80", "sm_90", "compute_120"), cuda="13.0"
)
InstallDriver = Callable[[str], None]


@pytest.fixture
def install_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InstallDriver:
    """Puts an `nvidia-smi` on the path that runs a shell command."""

    def install(command: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{command}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_a_full_node_is_described() -> None:
    verdict = judge_gpus([A100] * 8, EIGHT, needs_bf16=True)
    assert verdict.status == "ok"
    assert verdict.finding == (
        "8 x NVIDIA A100-SXM4-80GB 80 GiB; driver 580.65.06, torch's CUDA 13.0, "
        "compute capability 8.0"
    )


@pytest.mark.parametrize(
    ("view", "advice"),
    [
        (TorchView((), (), None), "build without CUDA"),
        (TorchView((), ("sm_80",), "13.0"), "install a driver that supports CUDA 13.0"),
        (replace(EIGHT, architectures=("sm_90", "sm_100")), "not compiled for compute capability"),
        (
            replace(EIGHT, capabilities=((7, 5),), architectures=("sm_75",)),
            "set training.precision",
        ),
    ],
)
def test_gpus_that_torch_cannot_use_fail(
    view: TorchView, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    verdict = judge_gpus([A100], view, needs_bf16=True)
    assert verdict.status == "failed"
    assert advice in verdict.advice


def test_hidden_gpus_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    verdict = judge_gpus([A100], replace(EIGHT, capabilities=()), needs_bf16=True)
    assert verdict.status == "failed"
    assert "CUDA_VISIBLE_DEVICES is ''" in verdict.advice


def test_an_old_gpu_serves_where_bf16_is_not_asked_for() -> None:
    view = replace(EIGHT, capabilities=((7, 5),), architectures=("sm_75",))
    assert judge_gpus([A100], view, needs_bf16=False).status == "ok"


def test_defective_memory_fails() -> None:
    verdict = judge_gpus([A100, replace(A100, uncorrected_errors=2)], EIGHT, needs_bf16=True)
    assert verdict.status == "failed"
    assert "GPU 1 has uncorrected memory errors" in verdict.advice


@pytest.mark.parametrize(
    ("other", "advice"),
    [
        (replace(A100, used_mib=40960), "memory of GPU 1 (40.0 GiB) is in use"),
        (replace(A100, name="NVIDIA A10G"), "different GPUs"),
    ],
)
def test_what_slows_a_run_down_is_a_warning(other: Gpu, advice: str) -> None:
    verdict = judge_gpus([A100, other], EIGHT, needs_bf16=True)
    assert verdict.status == "warning"
    assert advice in verdict.advice


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (9, 1), False),
        (["sm_100f"], (10, 3), True),
        (["sm_100f", "compute_90a"], (12, 0), False),
        (["sm_120"], (12, 1), True),
        ([], (8, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(
    architectures: list[str], capability: tuple[int, int], expected: bool
) -> None:
    assert is_supported(capability, architectures) is expected


def test_the_driver_is_asked(install_driver: InstallDriver) -> None:
    install_driver(
        "echo 'NVIDIA A100-SXM4-80GB, 580.65.06, 81920, 4, 0'\n"
        "echo 'NVIDIA GeForce RTX 4090, 580.65.06, 24564, 7, [N/A]'"
    )
    other = replace(A100, name="NVIDIA GeForce RTX 4090", total_mib=24564, used_mib=7)
    assert list_gpus() == [A100, other]


def test_a_driver_without_gpus_lists_none(install_driver: InstallDriver) -> None:
    install_driver("echo 'No devices were found'; exit 6")
    assert list_gpus() == []


def test_a_broken_driver_is_an_error(install_driver: InstallDriver) -> None:
    install_driver("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(RuntimeError, match="Driver/library version mismatch"):
        list_gpus()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_missing_gpu_fails_only_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert check_gpus(None).status == "ok"
    assert check_gpus(load_config(TINY, ["device=cpu"], RunConfig)).status == "ok"
    asking = load_config(TINY, ["device=cuda"], RunConfig)
    assert check_gpus(asking).status == "failed"
    on_cluster = load_config(TINY, ["device=cuda", "execution=ray"], RunConfig)
    assert check_gpus(on_cluster).status == "ok"
