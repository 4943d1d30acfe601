from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest
from support.records import read_records

from fqgan_dist.errors import DataError
from fqgan_dist.telemetry.json_lines import JsonLinesWriter, parse_records, read_lines


def write_steps(writer: JsonLinesWriter, steps: range) -> None:
    for step in steps:
        writer.write({"step": step, "text": "\u00e4" * step})


def test_lines_read_back_as_written(tmp_path: Path) -> None:
    with closing(JsonLinesWriter(tmp_path / "stage" / "ledger.jsonl")) as writer:
        write_steps(writer, range(1, 4))
        assert len(writer.read_lines()) == writer.num_records == 3
    assert [record["step"] for record in read_records(writer.path)] == [1, 2, 3]


def test_a_file_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="exists"):
        JsonLinesWriter(path)
    assert path.read_text() == '{"step": 1}\n'


def test_the_file_is_let_go_of_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = JsonLinesWriter(tmp_path / "x.jsonl")
    monkeypatch.setattr(os, "fsync", find_no_room)
    with pytest.raises(DataError, match=r"x\.jsonl: .*the disk is full"):
        writer.close()
    writer.close()  # there is nothing left to be done


def test_a_step_that_goes_back_is_refused(tmp_path: Path) -> None:
    with closing(JsonLinesWriter(tmp_path / "ledger.jsonl")) as writer:
        writer.write({"step": 5})
        with pytest.raises(ValueError, match="step 4 follows step 5"):
            writer.write({"step": 4})


def test_a_number_that_is_not_finite_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with closing(JsonLinesWriter(path)) as writer:
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.write({"step": 1, "value": float("nan")})
        writer.write({"step": 1})
    assert read_records(path) == [{"step": 1}]


def test_a_damaged_line_is_named() -> None:
    with pytest.raises(DataError, match="ledger:2: not a ledger record"):
        parse_records(b'{"step": 1}\n{"slot": 3}\n', name="ledger", kind="ledger")


def test_damaged_lines_are_named_and_the_others_read() -> None:
    data = b'{"step": 1}\nnot json\n{"step": 2}\n{"slot": 1}\n{"step": 3, "to'
    lines, problems = read_lines(data, name="ledger")
    assert lines == [(1, b'{"step": 1}\n'), (2, b'{"step": 2}\n')]
    assert [problem.partition(": ")[0] for problem in problems] == ["ledger:2", "ledger:4"]
