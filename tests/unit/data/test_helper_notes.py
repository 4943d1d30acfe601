"""What loader workers tell of themselves reaches the process that they load for."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.activity import Helper
from fqgan_dist.data.helper_notes import read_notes
from fqgan_dist.stopped_processes import ProcessId

PROCESS = ProcessId(host="host", pid=7, started=1, stacks_fd=3)


def leave(folder: Path, name: str, **values: Any) -> None:
    note = {"waiting": "", "still_s": 60.0, "process": asdict(PROCESS)}
    note["written_at"] = time.monotonic()
    (folder / f"helper-{name}.json").write_text(json.dumps(note | values))


def test_no_notes_say_nothing(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == Helper()
    assert read_notes(tmp_path / "gone") == Helper()


def test_one_that_waits_and_the_last_answer_of_any_count(tmp_path: Path) -> None:
    leave(tmp_path, "1")
    leave(tmp_path, "2", waiting="object storage", still_s=3.0)
    found = read_notes(tmp_path)
    assert found.waiting == "object storage"
    assert found.still_s == pytest.approx(3.0, abs=5)
    assert found.processes == (PROCESS, PROCESS)


def test_a_note_that_is_not_renewed_tells_only_whom_to_end(tmp_path: Path) -> None:
    leave(tmp_path, "1", waiting="object storage", written_at=time.monotonic() - 60)
    assert read_notes(tmp_path) == Helper(processes=(PROCESS,))
