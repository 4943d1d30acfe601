from __future__ import annotations

import resource
from pathlib import Path

import pytest

from fqgan_dist.diagnosis import host
from fqgan_dist.diagnosis.verdict import Verdict

GIB = 2**30


@pytest.mark.parametrize(
    "verdict",
    [
        host.check_cpus(None),
        host.check_memory(),
        host.check_shared_memory(),
        host.check_temporary_folder(),
        host.check_caches(),
        host.check_open_files(),
    ],
    ids=lambda verdict: verdict.check,
)
def test_this_machine_is_described(verdict: Verdict) -> None:
    # CI machines may be small, but not so small that tests would not run.
    assert verdict.status in ("ok", "warning")
    assert any(character.isdigit() for character in verdict.finding)


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (host.judge_shared_memory(64 * 2**20, 64 * 2**20), "failed"),  # docker's default
        (host.judge_shared_memory(GIB, GIB), "warning"),
        (host.judge_shared_memory(16 * GIB, 12 * GIB), "ok"),
        (host.judge_shared_memory(16 * GIB, GIB // 8), "failed"),
        (host.judge_memory(8 * GIB, GIB // 2), "failed"),
        (host.judge_memory(8 * GIB, 2 * GIB), "warning"),
        (host.judge_memory(8 * GIB, 6 * GIB), "ok"),
        (host.judge_cpus(8, 8, loader_workers=4), "warning"),
        (host.judge_cpus(96, 8, loader_workers=4), "ok"),
        (host.judge_cpus(1, 0, loader_workers=4), "ok"),
        (host.judge_open_files(128, 4096), "failed"),
        (host.judge_open_files(1024, 524288), "warning"),
        (host.judge_open_files(65536, 65536), "ok"),
        (host.judge_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok"),
    ],
)
def test_limits_decide(verdict: Verdict, status: str) -> None:
    assert verdict.status == status
    assert bool(verdict.advice) == (status != "ok")


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/proc/cache")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    verdict = host.check_caches()
    assert verdict.status == "failed"
    assert verdict.finding.startswith("/proc/cache: cannot be written")
    assert "set HF_HOME" in verdict.advice


def test_a_folder_is_left_as_it_was(tmp_path: Path) -> None:
    verdict = host.check_folder("x", tmp_path / "new" / "cache", variable="X")
    assert verdict.status in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []
