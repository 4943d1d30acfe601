from __future__ import annotations

import errno
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.log_files import name_log_file, open_log_file, publish_log
from fqgan_dist.telemetry.logging import configure_logging
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

    def refuse() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(handler, "flush", refuse)
    for _ in range(3):
        handler.handle(logging.makeLogRecord({"msg": "lost"}))
    shown = capsys.readouterr().err
    assert shown.count("lines of the log are lost ([Errno 28] No space left on device)") == 1
    assert "Traceback" not in shown
    monkeypatch.undo()
    handler.close()
