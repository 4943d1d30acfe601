"""A real disk that fills up under a run: it waits, says so, and goes on when there is room."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.crash_runs import read_state, run_session
from support.small_disks import filled, mount_small_disk
from support.waiting import wait_until

from fqgan_dist.errors import PassingError, StorageOutageError
from fqgan_dist.storage import disk_waits
from fqgan_dist.storage.disk_errors import explain_if_of_disk
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.waiting import PatienceConfig, patient
from fqgan_dist.world import World

pytestmark = pytest.mark.full("mounts disks; a full disk is injected in unit/storage and telemetry")

_DISK_BYTES = 2 * 2**20
_PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(disk_waits, "_FIRST_WAIT_S", 0.01)
    with mount_small_disk(tmp_path / "disk", _DISK_BYTES) as folder:
        yield folder


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()


@contextmanager
def room_when_it_is_waited_for(
    disk: Path, caplog: pytest.LogCaptureFixture, left: int
) -> Iterator[None]:
    """Fill a disk but for some bytes, until a line says that it is full."""
    with_room = threading.Event()

    def make_room() -> None:
        with filled(disk, left_bytes=left):
            with_room.set()
            wait_until(lambda: "the disk is full" in caplog.text)

    thread = threading.Thread(target=make_room)
    thread.start()
    assert with_room.wait(30)
    yield
    thread.join(60)


def run_until_done(storage: Storage) -> None:
    """Run again after what passes, as whoever starts a run does for exit code 75."""
    while True:
        try:
            run_session(storage)
        except (PassingError, OSError) as error:  # of what is not written by the storage room
            explained = explain_if_of_disk(error)
            if not isinstance(explained, PassingError):
                raise
            logging.getLogger("fqgan_dist").warning("%s", explained)
        else:
            return


@pytest.mark.parametrize("left", [0, 3, 5, 7, 9, 11, 12])
def test_a_run_ends_as_on_a_large_disk(
    disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    """With so many pages left it comes to the end of its room at another file each time."""
    calm = Storage(tmp_path / "calm")
    run_session(calm)
    storage = Storage(disk / "run")
    with patient(PatienceConfig()), room_when_it_is_waited_for(disk, caplog, left * _PAGE):
        run_until_done(storage)
    assert "the disk is full" in caplog.text
    assert "Traceback" not in caplog.text
    assert read_state(storage, tmp_path / "1") == read_state(calm, tmp_path / "0")
    assert not [path for path in disk.rglob("*") if ".writing-" in path.name]


def test_a_command_says_it_in_one_line_and_leaves_nothing(disk: Path) -> None:
    with filled(disk, left_bytes=_PAGE), pytest.raises(StorageOutageError) as caught:
        Storage(disk).write_bytes("a", bytes(10 * _PAGE))
    assert str(caught.value).startswith(f"{disk}/a: cannot be read or written")
    assert "free space on it" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(disk.iterdir()) == []


def test_the_log_loses_lines_and_goes_on(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(World(), open_log_file(Storage(disk), "driver"))
    logger = logging.getLogger("fqgan_dist.somewhere")
    with filled(disk):
        for number in range(300):
            logger.info("line %d %s", number, "x" * 100)
        assert capsys.readouterr().err.count("lines of the log are lost") == 1
    logger.info("there is room again")
    (file,) = (disk / "logs").iterdir()
    text = file.read_text()
    assert "lines of the log are lost here: [Errno 28]" in text
    assert text.endswith("there is room again\n")
