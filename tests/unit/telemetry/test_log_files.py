from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fqgan_dist.errors import DataError, StorageOutageError
from fqgan_dist.storage import disk_waits
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import name_log_file, open_log_file, publish_log, write_to_log
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.waiting import PatienceConfig, patient
from fqgan_dist.world import World


class Bucket(Storage):
    """A bucket that can be made to fail."""

    def __init__(self) -> None:
        super().__init__("s3://bucket")
        self.objects: dict[str, bytes] = {}
        self.writes = 0
        self.is_down = False
        self.written = threading.Event()

    def write_bytes(self, path: str, data: bytes) -> None:
        if self.is_down:
            raise DataError("s3://bucket: cannot be read or written")
        self.writes += 1
        self.objects[path] = data
        self.written.set()

    @property
    def text(self) -> str:
        (data,) = self.objects.values()
        return data.decode()


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    level = logging.getLogger("fqgan_dist").level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    logging.getLogger("fqgan_dist").setLevel(level)


logger = logging.getLogger("fqgan_dist.somewhere")


def test_names_differ_between_attempts_and_sort_by_process() -> None:
    names = {name_log_file("tokenizer-rank-00003") for _ in range(50)}
    assert len(names) == 50
    for name in names:
        assert re.fullmatch(r"tokenizer-rank-00003-\d{8}T\d{6}-[0-9a-f]{8}\.log", name)


def test_below_a_local_root_the_file_is_written_in_place(tmp_path: Path) -> None:
    configure_logging(World(), open_log_file(Storage(tmp_path), "run-rank-00000"))
    logger.info("kept")
    (file,) = (tmp_path / "logs").glob("run-rank-00000-*.log")
    assert "kept" in file.read_text()
    publish_log()


def test_stacks_go_to_the_log_in_the_bucket_and_to_no_console(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = Bucket()
    configure_logging(World(), open_log_file(bucket, "run", interval_s=60))
    write_to_log("thread training:\n  File 100%")
    publish_log()
    assert "thread training:\n" in bucket.text
    assert bucket.text.endswith("  File 100%\n")
    assert capsys.readouterr().err == ""


def test_without_a_log_stacks_are_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    write_to_log("thread training")
    assert caplog.messages == ["thread training"]


def test_for_a_bucket_the_file_is_published_from_time_to_time() -> None:
    bucket = Bucket()
    configure_logging(World(), open_log_file(bucket, "driver", interval_s=0.01))
    logger.info("kept")
    assert bucket.written.wait(10)
    (name,) = bucket.objects
    assert name.startswith("logs/driver-")
    assert "kept" in bucket.text


def test_for_a_bucket_the_file_is_published_on_demand_and_at_the_end() -> None:
    bucket = Bucket()
    handler = open_log_file(bucket, "driver", interval_s=1000)
    configure_logging(World(), handler)
    logger.info("first")
    publish_log()
    publish_log()
    assert bucket.writes == 1
    assert "first" in bucket.text
    logger.info("second")
    folder = Path(handler.baseFilename).parent
    configure_logging(World(), None)
    assert "second" in bucket.text
    assert not folder.exists()


def test_a_bucket_that_is_down_is_warned_of_once_and_tried_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = Bucket()
    configure_logging(World(), open_log_file(bucket, "driver", interval_s=1000))
    bucket.is_down = True
    logger.info("kept")
    for _ in range(3):
        publish_log()
    assert capsys.readouterr().err.count("cannot be published (DataError: s3://bucket") == 1
    bucket.is_down = False
    publish_log()
    assert "kept" in bucket.text


def test_an_exit_publishes_the_rest(tmp_path: Path) -> None:
    # In a process of its own: the end of the interpreter is what is tested.
    script = f"""
import logging, pathlib
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import open_log_file
from fqgan_dist.telemetry.logging import configure_logging
from fqgan_dist.world import World

class Bucket(Storage):
    def write_bytes(self, path, data):
        logging.getLogger("client").warning("a client that logs while it writes")
        pathlib.Path({str(tmp_path / "log")!r}).write_bytes(data)

configure_logging(World(), open_log_file(Bucket("s3://bucket"), "driver"))
logging.getLogger("fqgan_dist").info("the last line")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the last line" in (tmp_path / "log").read_text()


def test_a_full_disk_is_said_once_and_fails_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = open_log_file(Storage(tmp_path), "driver")
    write, room = os.write, [6]

    def write_while_there_is_room(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr("fqgan_dist.telemetry.log_files.os.write", write_while_there_is_room)
    for text in ("here", "torn", "lost", "lost"):
        handler.handle(logging.makeLogRecord({"msg": text}))
    shown = capsys.readouterr().err
    assert shown.count("lines of the log are lost ([Errno 28] No space left on device)") == 1
    assert "Traceback" not in shown
    room[0] = 10**6
    handler.handle(logging.makeLogRecord({"msg": "here again"}))
    handler.close()
    (file,) = (tmp_path / "logs").iterdir()
    assert file.read_text().splitlines() == [
        "here",
        "t",
        "3 lines of the log are lost here: [Errno 28] No space left on device",
        "here again",
    ]
    room[0] = 0
    handler.handle(logging.makeLogRecord({"msg": "lost again"}))
    handler.close()
    assert capsys.readouterr().err.count("lines of the log are lost") == 1


def test_a_line_that_comes_after_the_end_opens_the_file_again(tmp_path: Path) -> None:
    handler = open_log_file(Storage(tmp_path), "driver")
    handler.close()
    handler.handle(logging.makeLogRecord({"msg": "late \udcff"}))
    handler.close()
    (file,) = (tmp_path / "logs").iterdir()
    assert file.read_text() == "late \\udcff\n"


def test_a_run_waits_for_room_for_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_waits, "_FIRST_WAIT_S", 0.001)
    open_file, refusals = os.open, [2]

    def refuse_twice(path: str, flags: int, *rest: int) -> int:
        if str(path).endswith(".log") and refusals[0]:
            refusals[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return open_file(path, flags, *rest)

    monkeypatch.setattr("fqgan_dist.telemetry.log_files.os.open", refuse_twice)
    with pytest.raises(StorageOutageError, match=r"logs/driver-.*the disk is full"):
        open_log_file(Storage(tmp_path), "driver")
    with patient(PatienceConfig()):
        open_log_file(Storage(tmp_path), "driver").close()
    assert refusals == [0]
