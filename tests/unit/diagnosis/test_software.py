from __future__ import annotations

from pathlib import Path

import pytest

from fqgan_dist.diagnosis.software import check_deepspeed, check_packages, check_python


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that are found before the installed ones."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def describe_project(site: Path, *lines: str) -> None:
    folder = site / "fqgan_dist-9.9.dist-info"
    folder.mkdir()
    text = "\n".join(("Metadata-Version: 2.1", "Name: fqgan-dist", "Version: 9.9", *lines))
    (folder / "METADATA").write_text(f"{text}\n")


def test_this_environment_is_as_required() -> None:
    assert check_python().status == "ok"
    verdict = check_packages()
    assert verdict.status == "ok"
    assert "torch" in verdict.finding


def test_another_python_is_named(site: Path) -> None:
    describe_project(site, "Requires-Python: >=4")
    verdict = check_python()
    assert verdict.status == "failed"
    assert "expected >=4" in verdict.finding


def test_every_wrong_package_is_named(site: Path) -> None:
    describe_project(
        site,
        "Requires-Dist: numpy>=2",
        "Requires-Dist: torch<1",
        "Requires-Dist: no-such-package",
        'Requires-Dist: no-such-tool; extra == "dev"',
    )
    verdict = check_packages()
    assert verdict.status == "failed"
    assert "torch is 2." in verdict.finding
    assert "expected <1" in verdict.finding
    assert "no-such-package is not installed" in verdict.finding
    assert "numpy" not in verdict.finding
    assert "no-such-tool" not in verdict.finding


def test_deepspeed_is_imported() -> None:
    verdict = check_deepspeed()
    assert verdict.status == "ok"
    assert verdict.finding.startswith("0.19.")


def test_a_deepspeed_that_cannot_be_imported_is_a_finding(site: Path) -> None:
    (site / "deepspeed.py").write_text("raise ImportError('undefined symbol: cudaFoo')\n")
    verdict = check_deepspeed()
    assert verdict.status == "failed"
    assert "undefined symbol: cudaFoo" in verdict.finding
