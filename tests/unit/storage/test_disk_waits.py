"""A run waits for room on a disk; a command says at once that there is none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fqgan_dist import waiting
from fqgan_dist.errors import DataError, StorageOutageError
from fqgan_dist.storage import disk_waits
from fqgan_dist.storage.storage import Storage
from fqgan_dist.waiting import STORAGE_VARIABLE, WAITS, PatienceConfig, patient


class FailingDisk:
    """Fails so many of the next syncs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
        self.left, self.shown = times, list[str]()
        sync = os.fsync

        def fail(descriptor: int) -> None:
            if self.left:
                self.left -= 1
                self.shown.append(str(WAITS.longest()))
                raise OSError(number, os.strerror(number))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fail)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(disk_waits, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(waiting, "WORTH_A_WORD_S", 0.0)
    (tmp_path / "run").mkdir()
    return Storage(tmp_path / "run")


def write(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"3")
    storage.write_bytes("a", b"1")
    storage.create_bytes("b", b"2")
    storage.write_file("c", tmp_path / "file")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT])
def test_a_run_goes_on_when_there_is_room(
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    disk = FailingDisk(monkeypatch, number, 5)
    with patient(PatienceConfig()):
        write(storage, tmp_path)
    assert [storage.read_bytes(name) for name in "abc"] == [b"1", b"2", b"3"]
    assert storage.list() == ["a", "b", "c"]
    assert disk.shown[0] == "None"
    assert os.strerror(number) in disk.shown[1]
    assert "the run goes on by itself" in caplog.text
    assert "no longer waited for" in caplog.text
    assert WAITS.longest() is None


@pytest.mark.parametrize("is_run", [False, True])
def test_it_ends_when_patience_does_and_leaves_nothing_behind(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, is_run: bool
) -> None:
    if is_run:
        monkeypatch.setenv(STORAGE_VARIABLE, "0.05")
    disk = FailingDisk(monkeypatch, errno.ENOSPC, 10**6)
    with pytest.raises(StorageOutageError, match="the disk is full: free space on it"):
        storage.write_bytes("a", b"1")
    assert (len(disk.shown) > 1) is is_run
    assert storage.list() == []
    assert list(Path(storage.root).iterdir()) == []


def test_other_errors_are_not_waited_for(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FailingDisk(monkeypatch, errno.EIO, 10**6)
    with patient(PatienceConfig()), pytest.raises(DataError) as caught:
        storage.write_bytes("a", b"1")
    assert not isinstance(caught.value, StorageOutageError)
    assert len(disk.shown) == 1
