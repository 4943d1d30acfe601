"""What killed writers leave is removed, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.dead_owners import name_dead_owner, name_foreign_owner
from support.small_s3 import SmallS3, Upload, run_small_s3, set_credentials

from fqgan_dist.errors import DataError
from fqgan_dist.storage import s3_store
from fqgan_dist.storage.leftovers import (
    Swept,
    is_abandoned_mark,
    name_mark,
    name_probe_of_rank,
)
from fqgan_dist.storage.owners import FOREIGN_S, name_owner
from fqgan_dist.storage.scratch import ScratchFolder, sweep_scratch
from fqgan_dist.storage.storage import Storage
from fqgan_dist.storage.sweeping import sweep_leftovers, sweep_root

KILLED_WRITER = """
import os, sys
from fqgan_dist.storage.storage import Storage
os.fsync = lambda descriptor: os._exit(9)  # in the middle of a write
Storage(sys.argv[1]).write_bytes("part", bytes(1000))
"""


def at(moment: float) -> tuple[float, float]:
    """Give the times of a file that was last touched at a moment."""
    return moment, moment


def leave(folder: Path, owner: str | None, *, name: str = "part", age_s: float = 0.0) -> Path:
    """Make the temporary file of a writer, of 1000 bytes."""
    end = "0" * 32 if owner is None else f"{owner}-{'0' * 8}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.writing-{end}"
    path.write_bytes(bytes(1000))
    os.utime(path, times=at(time.time() - age_s))
    return path


def test_what_a_killed_writer_leaves_is_removed(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path)], check=False)
    assert process.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.stat().st_size == 1000
    assert Storage(tmp_path).list() == []
    assert Storage(tmp_path).sweep() == Swept(1, 1000)
    assert list(tmp_path.iterdir()) == []


def test_no_living_ones_file_is_removed(tmp_path: Path) -> None:
    leave(tmp_path, name_owner(), age_s=10 * FOREIGN_S)
    leave(tmp_path, name_foreign_owner(), age_s=FOREIGN_S / 2)
    leave(tmp_path, None, name="of before", age_s=FOREIGN_S / 2)
    assert Storage(tmp_path).sweep() == Swept()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("owner", [None, name_foreign_owner()], ids=["unnamed", "foreign"])
def test_what_another_host_left_goes_after_a_day(tmp_path: Path, owner: str | None) -> None:
    leave(tmp_path / "a", owner, age_s=FOREIGN_S + 60)
    assert Storage(tmp_path).sweep() == Swept(1, 1000)


def test_age_is_by_the_clock_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, name_foreign_owner())
    now = time.time() + 2 * FOREIGN_S
    monkeypatch.setattr(time, "time", lambda: now)
    assert Storage(tmp_path).sweep() == Swept()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_overtaken_goes_whoever_writes_it(tmp_path: Path) -> None:
    leave(tmp_path / "a", name_owner())
    leave(tmp_path / "b", name_owner())
    assert Storage(tmp_path).sweep("a", is_superseded=True) == Swept(1, 1000)
    assert len(list((tmp_path / "b").iterdir())) == 1


def test_other_files_folders_and_links_stay(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    leave(elsewhere, name_dead_owner())
    root.mkdir()
    (root / "link").symlink_to(elsewhere)
    (root / f".x.writing-{name_dead_owner()}").write_bytes(b"1")  # no name of ours
    (root / "x.writing-notes").write_bytes(b"1")
    (root / f".x.writing-{name_dead_owner()}-00000000").mkdir()
    assert sweep_root(Storage(root)) == Swept()
    assert len(list(root.iterdir())) == 4
    assert len(list(elsewhere.iterdir())) == 1


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert Storage(tmp_path / "no").sweep() == Swept()
    (tmp_path / "file").write_bytes(b"1")
    assert Storage(tmp_path).sweep("file") == Swept()


def test_the_longest_name_has_room_for_its_owner(tmp_path: Path) -> None:
    Storage(tmp_path).write_bytes("\U0001f600" * 63, b"1")
    assert len(Storage(tmp_path).list()) == 1


def test_a_sweep_that_fails_stops_nothing_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Swept:
        raise DataError("the store refuses it")

    leave(tmp_path, name_dead_owner())
    with caplog.at_level("INFO"):
        sweep_leftovers(fail, lambda: sweep_root(Storage(tmp_path)))
    assert "stays there: the store refuses it" in caplog.text
    assert "removed what killed processes had left: 1 files, 0.0 MB" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        sweep_leftovers(lambda: sweep_root(Storage(tmp_path)))
    assert caplog.text == ""


def test_marks_of_killed_processes_are_removed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    living = [name_mark("probe-driver"), name_mark("doctor")]
    dead = [name.replace(name_owner(), name_dead_owner()) for name in living]
    for probe in (living[0], dead[0], name_probe_of_rank(17), "probe-driver-mine"):
        storage.write_bytes(probe, b"")
    for folder in (living[1], dead[1]):
        storage.write_bytes(f"{folder}/large", bytes(500))
    leave(tmp_path / dead[1], name_owner())
    assert sweep_root(storage) == Swept(4, 1500)
    assert sorted(storage.list()) == sorted([*living, "probe-driver-mine"])


@pytest.mark.parametrize(("kind", "days"), [("doctor", 1), ("probe-driver", 30)])
def test_marks_of_other_hosts_go_by_age(
    monkeypatch: pytest.MonkeyPatch, kind: str, days: int
) -> None:
    mark = name_mark(kind).replace(name_owner(), name_foreign_owner())  # pyright: ignore[reportArgumentType] a literal
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + days * 86400 - 60)
    assert not is_abandoned_mark(mark)
    monkeypatch.setattr(time, "time", lambda: now + days * 86400 + 60)
    assert is_abandoned_mark(mark)


class TestScratch:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path

    def leave(self, folder: Path, owner: str, *, age_s: float = 0.0) -> Path:
        left = folder / f"fqgan-ray-train-{owner}-abcd_123"
        (left / "inner").mkdir(parents=True)
        (left / "inner" / "file").write_bytes(bytes(1000))
        for path in (left, left / "inner", left / "inner" / "file"):
            os.utime(path, times=at(time.time() - age_s))
        return left

    def test_it_is_removed_at_the_end(self, folder: Path) -> None:
        with ScratchFolder("log") as name:
            assert Path(name).parent == folder
        assert list(folder.iterdir()) == []

    def test_a_living_ones_is_not_swept_and_a_dead_ones_is(self, folder: Path) -> None:
        left = self.leave(folder, name_dead_owner())
        with ScratchFolder("log") as name:
            assert sweep_scratch().files == 1
            assert not left.exists()
            assert Path(name).is_dir()

    def test_another_containers_stays_for_a_day(self, folder: Path) -> None:
        left = self.leave(folder, name_foreign_owner(), age_s=FOREIGN_S - 60)
        assert sweep_scratch() == Swept()
        left.rename(folder / "x")
        self.leave(folder, name_foreign_owner(), age_s=FOREIGN_S + 60)
        assert sweep_scratch().files == 1

    def test_another_containers_stays_while_it_is_locked(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        foreign = name_foreign_owner()
        monkeypatch.setattr("fqgan_dist.storage.scratch.name_owner", lambda: foreign)
        scratch = ScratchFolder("log")
        os.utime(scratch.name, times=at(time.time() - 2 * FOREIGN_S))
        assert sweep_scratch() == Swept()
        scratch._unlock()
        assert sweep_scratch().files == 1
        scratch.cleanup()

    def test_names_of_others_stay(self, folder: Path, tmp_path: Path) -> None:
        (folder / "fqgan-files-abcd1234").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (folder / f"fqgan-log-{name_dead_owner()}-abcd1234").symlink_to(tmp_path / "elsewhere")
        assert sweep_scratch() == Swept()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    with run_small_s3() as state:
        set_credentials(monkeypatch, state.endpoint)
        yield state


def test_large_objects_are_written_in_parts(
    server: SmallS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_MULTIPART_FROM_BYTES", 2000)
    monkeypatch.setattr(s3_store, "_PART_BYTES", 1000)
    data = os.urandom(3500)
    Storage("s3://bucket/run").write_bytes("large", data)
    assert server.objects["/bucket/run/large"] == data
    assert server.uploads == {}


def test_uploads_begun_a_day_ago_are_aborted(server: SmallS3) -> None:
    long_ago = datetime.now(UTC) - timedelta(seconds=FOREIGN_S + 60)
    parts = {1: bytes(1000), 2: bytes(10)}
    for number in range(5):
        server.uploads[f"old-{number}"] = Upload(f"/bucket/run/a/{number}", parts, long_ago)
    server.uploads["young"] = Upload("/bucket/run/a/0", parts)
    server.uploads["others"] = Upload("/bucket/run-2/a", parts, long_ago)
    storage = Storage("s3://bucket/run")
    storage.write_bytes("a/object", b"1")
    assert sweep_root(storage) == Swept(5, 5050)
    assert server.uploads.keys() == {"young", "others"}
    assert storage.sweep("a", is_superseded=True) == Swept(1, 1010)
    assert storage.list("a") == ["object"]
