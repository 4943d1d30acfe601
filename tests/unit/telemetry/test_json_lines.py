from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from support.records import read_records

from fqgan_dist.errors import DataError
from fqgan_dist.telemetry.json_lines import JsonLinesWriter, parse_records


def write_steps(writer: JsonLinesWriter, steps: range) -> None:
    for step in steps:
        writer.write({"step": step, "text": "\u00e4" * step})


def test_without_a_record_there_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "ledger.jsonl"
    with closing(JsonLinesWriter(path)) as writer:
        writer.flush()
    assert not path.exists()
    assert writer.num_records == 0


def test_a_resumed_file_equals_an_unbroken_one(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken.jsonl", tmp_path / "broken.jsonl"
    with closing(JsonLinesWriter(unbroken)) as writer:
        write_steps(writer, range(1, 9))
    with closing(JsonLinesWriter(broken)) as writer:
        write_steps(writer, range(1, 7))
    with broken.open("a") as file:
        file.write('{"step": 7, "te')  # torn by a kill
    with closing(JsonLinesWriter(broken, resumed_step=4)) as writer:
        assert writer.num_records == 4
        write_steps(writer, range(5, 9))
        assert writer.num_records == 8
    assert broken.read_bytes() == unbroken.read_bytes()


def test_nothing_is_left_of_a_history_that_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with closing(JsonLinesWriter(path)) as writer:
        write_steps(writer, range(1, 4))
    with closing(JsonLinesWriter(path)) as writer:
        assert writer.num_records == 0
    assert read_records(path) == []


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
