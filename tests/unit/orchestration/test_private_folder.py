from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from support.dead_owners import name_dead_owner, name_foreign_owner

from fqgan_dist.errors import ConfigError
from fqgan_dist.orchestration.private_folder import (
    FOLDER_VARIABLES,
    check_socket_paths,
    max_folder_bytes,
    private_folder,
)
from fqgan_dist.storage.owners import name_owner


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOLDER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_default_has_room() -> None:
    check_socket_paths()


@pytest.mark.parametrize("name", FOLDER_VARIABLES)
def test_a_folder_with_a_long_path_is_refused_with_the_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "/" + "x" * (max_folder_bytes() - 1) + "/")
    check_socket_paths()
    # Two bytes each: what counts is bytes.
    monkeypatch.setenv(name, "/" + "é" * (max_folder_bytes() // 2 + 1))
    with pytest.raises(ConfigError, match=f"{name}: .*expected {max_folder_bytes()} at most"):
        check_socket_paths()


def test_rays_own_variable_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/" + "x" * 200)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_socket_paths()


def test_a_relative_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "tmp")
    with pytest.raises(ConfigError, match="no absolute path"):
        check_socket_paths()


def test_ray_allows_what_is_allowed_here() -> None:
    utils = pytest.importorskip("ray._private.utils")
    folder = "/" + "x" * (max_folder_bytes() - 1)
    session = f"session_2026-11-28_21-06-04_123456_{os.getpid()}"
    inner = f"ray-abcd1234/r/{session}/sockets/plasma_store"
    utils.validate_socket_filepath(f"{folder}/{inner}")
    with pytest.raises(OSError, match="AF_UNIX"):
        utils.validate_socket_filepath(f"{folder}x/{inner}")


def test_nobody_else_enters_the_folder_and_it_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fqgan_dist.orchestration.private_folder.check_socket_paths", lambda: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with private_folder() as folder:
        outer = Path(folder).parent
        assert outer.parent == tmp_path
        assert stat.S_IMODE(outer.stat().st_mode) == 0o700
        Path(folder).mkdir(mode=0o777)
    assert list(tmp_path.iterdir()) == []


def test_logs_are_kept_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fqgan_dist.orchestration.private_folder.check_socket_paths", lambda: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(RuntimeError), private_folder():
        raise RuntimeError
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    with pytest.raises(ConfigError, match="/proc: no folder for Ray can be made there"):
        private_folder().__enter__()


def test_the_folder_of_a_killed_driver_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fqgan_dist.orchestration.private_folder.check_socket_paths", lambda: None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    owners = {"ray-deadaaaa": name_dead_owner(), "ray-liveaaaa": name_owner()}
    owners |= {"ray-keptaaaa": "kept", "ray-oldkeptb": "kept", "ray-foreigna": name_foreign_owner()}
    owners |= {"ray-anything": "notes of a person", "rays-notours": name_dead_owner()}
    for name, owner in owners.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text(owner)
    (tmp_path / "ray-nobodysa").mkdir()
    week_ago = time.time() - 8 * 86400
    for path in (tmp_path / "ray-oldkeptb" / "owner", tmp_path / "ray-oldkeptb"):
        os.utime(path, (week_ago, week_ago))
    with private_folder() as first, private_folder() as second:
        assert Path(first).parent.is_dir()
        assert Path(second).parent.is_dir()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == (owners.keys() | {"ray-nobodysa"}) - {"ray-deadaaaa", "ray-oldkeptb"}
