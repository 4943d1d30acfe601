from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from fqgan_dist.telemetry.environment import collect_environment, describe_source


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "--quiet")
    (root / "file.txt").write_text("one")
    git(root, "add", "file.txt")
    git(root, "commit", "--quiet", "--no-verify", "-m", "first")
    return root


def test_versions_are_recorded_and_json_able() -> None:
    environment = collect_environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["torch"] == torch.__version__
    assert environment["packages"]["pydantic"].startswith("2.")


def test_no_environment_variable_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-value")
    assert "a-very-secret-value" not in json.dumps(collect_environment())


def test_the_commit_of_a_clean_checkout_is_named(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert describe_source(repository) == {"commit": commit, "modified": False}


def test_changed_tracked_files_are_said(repository: Path) -> None:
    (repository / "untracked.txt").write_text("new")
    assert describe_source(repository)["modified"] is False  # type: ignore[index]
    (repository / "file.txt").write_text("two")
    assert describe_source(repository)["modified"] is True  # type: ignore[index]


def test_a_directory_inside_a_foreign_repository_has_no_commit(repository: Path) -> None:
    inside = repository / "site-packages"
    inside.mkdir()
    assert describe_source(inside) is None


def test_a_directory_outside_any_repository_has_no_commit(tmp_path: Path) -> None:
    assert describe_source(tmp_path) is None
