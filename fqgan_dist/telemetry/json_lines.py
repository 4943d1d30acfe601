"""Files of one JSON object per line, each of a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fqgan_dist.errors import DataError
from fqgan_dist.storage.disk_errors import clear_disk_errors
from fqgan_dist.storage.documents import parse_json

Record = dict[str, Any]
"""One line; `step` is the optimizer step that it belongs to."""


class JsonLinesWriter:
    """Append records to a local file; one process per file."""

    def __init__(self, path: Path) -> None:
        """Make a new file, and its folder when that is missing.

        Raises:
            DataError: it is there already, or the disk is full or cannot be written.
        """
        self.path = path
        with clear_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("x", encoding="utf-8")
        self.num_records = 0
        """Records in the file."""
        self._last_step = 0

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
            self._file.write(line)
            self._file.flush()
        self._last_step = record["step"]
        self.num_records += 1

    def read_lines(self) -> list[bytes]:
        """Read back what was written."""
        with clear_disk_errors(self.path):
            return complete_lines(self.path.read_bytes())

    def flush(self) -> None:
        """Bring everything written so far to the disk."""
        if not self._file.closed:
            with clear_disk_errors(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; closing twice is harmless."""
        try:
            self.flush()
        finally:
            # Where there is no room the rest is lost with an error, but the file is let go of.
            with clear_disk_errors(self.path):
                self._file.close()


def parse_records(data: bytes, *, name: str, kind: str) -> list[Record]:
    """Parse the bytes of a file, wherever they were stored; a last line torn by a kill is left out.

    Raises:
        DataError: a complete line is not a record; it names the file and the kind of its records.
    """
    return [
        _parse_record(line, f"{name}:{number}", kind)
        for number, line in enumerate(complete_lines(data), start=1)
    ]


def read_lines(data: bytes, *, name: str) -> tuple[list[tuple[int, bytes]], list[str]]:
    """Split the bytes of a file into the step and bytes of each line, and what is wrong with it."""
    lines: list[tuple[int, bytes]] = []
    problems: list[str] = []
    for number, line in enumerate(complete_lines(data), start=1):
        try:
            lines.append((_parse_record(line, f"{name}:{number}", "run")["step"], line))
        except DataError as error:
            problems.append(str(error))
    return lines, problems


def _parse_record(line: bytes, where: str, kind: str) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); delete or repair the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError(f"{where}: not a {kind} record; expected an object with an integer 'step'")
    return record


def complete_lines(data: bytes) -> list[bytes]:
    """Split the bytes of a file; a last line torn by a kill is left out."""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
