"""Files of one JSON object per line, each of a step: continued by a resumed run, never repeated.

A run that resumes from a step first removes what was recorded after it. So the file is what it
would be if the run had never been killed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from fqgan_dist.errors import DataError
from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.documents import parse_json

Record = dict[str, Any]
"""One line; `step` is the optimizer step that it belongs to."""

logger = logging.getLogger(__name__)


class JsonLinesWriter:
    """Append records to a local file; one process per file."""

    def __init__(self, path: Path, *, resumed_step: int = 0) -> None:
        """Drop what a killed run recorded after `resumed_step` (0: all of it).

        The folder is made when missing, the file by the first record.
        """
        self.path = path
        with clear_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _truncate(path, resumed_step)
        self.num_records = len(kept)
        """Records in the file."""
        self._last_step = max(kept, default=0)
        self._file: TextIO | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, in one write, so that a kill tears at most the last line.

        Raises:
            ValueError: the step goes back, or a number is not finite.
            DataError: the disk is full or cannot be written.
        """
        if record["step"] < self._last_step:
            raise ValueError(
                f"step {record['step']} follows step {self._last_step} in {self.path}; "
                "steps must not decrease"
            )
        line = json.dumps(record, allow_nan=False) + "\n"
        with clear_disk_errors(self.path):
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
        self._last_step = record["step"]
        self.num_records += 1

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; closing twice is harmless."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def parse_records(data: bytes, *, name: str, kind: str) -> list[Record]:
    """Parse the bytes of a file, wherever they were stored; a last line torn by a kill is left out.

    Raises:
        DataError: a complete line is not a record; it names the file and the kind of its records.
    """
    return [
        _parse_record(line, f"{name}:{number}", kind)
        for number, line in enumerate(_complete_lines(data), start=1)
    ]


def _parse_record(line: bytes, where: str, kind: str) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); delete or repair the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError(f"{where}: not a {kind} record; expected an object with an integer 'step'")
    return record


def _truncate(path: Path, resumed_step: int) -> list[int]:
    """Keep records up to `resumed_step`, by an atomic rewrite; return the steps kept."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = _complete_lines(data)
    steps = [record["step"] for record in parse_records(data, name=str(path), kind="run")]
    kept = [index for index, step in enumerate(steps) if step <= resumed_step]
    if len(kept) < len(lines):
        removed = len(lines) - len(kept)
        logger.info("%s: removed %d records after step %d", path, removed, resumed_step)
    # Always rewritten: a torn last line would otherwise run into the next record.
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(lines[index] for index in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return [steps[index] for index in kept]


def _complete_lines(data: bytes) -> list[bytes]:
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
