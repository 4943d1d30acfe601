from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fqgan_dist.errors import DataError, StorageOutageError
from fqgan_dist.storage.disk_errors import clear_disk_errors, explain_if_of_disk
from fqgan_dist.storage.storage import Storage

FULL = Path("/dev/full")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "access is refused.*permissions"),
        (errno.ENAMETOOLONG, "shorten"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "check the disk"),
    ],
)
def test_errors_of_disks_name_the_file_and_what_to_do(number: int, advice: str) -> None:
    with pytest.raises(DataError, match=rf"^/data/x: .*{advice}"), clear_disk_errors("/data/x"):
        raise OSError(number, os.strerror(number), "/data/x")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="free space"), clear_disk_errors(FULL):
        FULL.write_bytes(b"x")


def test_a_write_that_a_disk_refuses_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fqgan_dist.storage.local_store.os.fsync", refuse)
    storage = Storage(tmp_path)
    for write in (storage.write_bytes, storage.create_bytes):
        with pytest.raises(DataError, match=f"{tmp_path}/a: .*No space left.*free space"):
            write("a", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageOutageError),
        (OSError(errno.EROFS, "Read-only file system", "/x"), DataError),
        (OSError(errno.ESTALE, "Stale file handle", "/x"), StorageOutageError),
    ],
)
def test_raw_errors_of_disks_become_ours_where_a_process_ends(
    error: OSError, kind: type[Exception]
) -> None:
    explained = explain_if_of_disk(error)
    assert type(explained) is kind
    assert explained.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        FileNotFoundError(errno.ENOENT, "No such file", "/x"),
        OSError("something"),
        RuntimeError("x"),
        StorageOutageError("x"),
    ],
    ids=repr,
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert explain_if_of_disk(error) is error


def test_names_that_are_too_long_are_no_traceback(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(DataError, match="shorten it"):
        storage.write_bytes("x" * 300, b"")
    with pytest.raises(DataError, match="shorten it"):
        storage.write_bytes("/".join(["x" * 200] * 25), b"")
