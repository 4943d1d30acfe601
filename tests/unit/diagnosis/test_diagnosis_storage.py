"""The storage checks on local roots; for buckets see tests/integration/test_doctor_s3.py."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from fqgan_dist.diagnosis.storage import (
    check_access,
    check_space,
    check_speed,
    judge_space,
    judge_speed,
)

GIB = 2**30


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 64 KiB, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_root_that_works_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert check_access(str(tmp_path / "run")).status == "ok"
    assert check_speed(str(tmp_path / "run")).status in ("ok", "warning")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_root_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    verdict = check_access(str(tmp_path / "new" / "run"))
    assert verdict.status == "ok"
    assert verdict.finding.endswith("write, read, create-only, list, delete fine")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_a_folder_without_the_right_to_write_is_explained(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    root.chmod(0o555)
    request.getfixturevalue("without_root")
    verdict = check_access(str(root))
    assert verdict.status == "failed"
    assert f"{root}: write: " in verdict.finding
    assert "access is refused" in verdict.finding
    assert "give this user the right to write there" in verdict.advice


def test_a_full_disk_fails_the_transfer(tmp_path: Path, small_files: None) -> None:
    assert check_access(str(tmp_path)).status == "ok"
    verdict = check_speed(str(tmp_path))
    assert verdict.status == "failed"
    assert "File too large" in verdict.finding
    assert "ulimit -f" in verdict.advice
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_root_should_be_fails(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    verdict = check_access(str(tmp_path / "run"))
    assert verdict.status == "failed"
    assert (tmp_path / "run").is_file()


def test_the_space_of_a_root_that_is_not_there_yet_is_that_of_its_disk(tmp_path: Path) -> None:
    assert "GiB free" in check_space(str(tmp_path / "a" / "b")).finding


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, "failed"), (1.5, "warning"), (25.0, "ok")])
def test_little_space_is_said(free_gib: float, status: str) -> None:
    assert judge_space("x", "/run", int(free_gib * GIB)).status == status


@pytest.mark.parametrize(
    ("speeds", "advice"),
    [
        ({}, ""),
        ({"request_s": 0.5}, "use a nearer bucket"),
        ({"upload_mb_per_s": 5.0}, "uploads under 20 MB/s"),
        ({"download_mb_per_s": 30.0}, "downloads under 90 MB/s"),
    ],
)
def test_slowness_is_a_warning(speeds: dict[str, float], advice: str) -> None:
    fast = {"request_s": 0.02, "upload_mb_per_s": 200.0, "download_mb_per_s": 500.0}
    verdict = judge_speed(**{**fast, **speeds}, is_local=False)
    assert verdict.status == ("warning" if advice else "ok")
    assert advice in verdict.advice
