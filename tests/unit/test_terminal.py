from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.terminal import (
    CleanFormatter,
    Lines,
    clean_text,
    join_lines,
    keep_lines,
    printable,
    write,
    write_error,
    write_json,
)

HOSTILE = "\x1b]0;title\x07 \x1b[2J\r\nFORGED ok \u202e\u2066 \x9b31m \udc80 \x00 \u2028 \x7f"


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_what_is_not_printable_is_spelled_out() -> None:
    assert printable("a\x1b[31m\n\u202eb\udc80é") == "a\\x1b[31m\\n\\u202eb\\udc80é"


def test_a_line_of_its_own_cannot_be_forged() -> None:
    assert join_lines([f"name {HOSTILE}", "second"]).count("\n") == 1
    text = clean_text(f"name {HOSTILE}\nanother")
    assert is_clean(text)
    assert all(line.startswith("  ") for line in text.split("\n")[1:])


def test_lines_have_a_greatest_length() -> None:
    assert len(join_lines(["x" * 2**20])) < 5000
    assert "(1048576 characters)" in join_lines(["x" * 2**20])


@pytest.mark.parametrize("text", [HOSTILE, "a\nb\n  c\n\nd", "https://u:s3cr3t@h/?token=x"])
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once


def test_errors_are_clean_wherever_they_go() -> None:
    error = DataError(f"{HOSTILE} https://u:s3cr3t@h/x?X-Amz-Signature=s3cr3t")
    assert is_clean(str(error))
    assert "s3cr3t" not in str(error)
    assert "\nFORGED" not in str(error)
    assert isinstance(str(error), str)
    assert not isinstance(error.args[0], Lines)  # it is pickled for other processes


def test_output_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    write(HOSTILE)
    write_error(ConfigError(HOSTILE))
    write_json({"name": HOSTILE.replace("\udc80", "")})
    shown = capsys.readouterr()
    assert is_clean(shown.out)
    assert is_clean(shown.err)
    assert "\nFORGED" not in shown.out + shown.err
    assert json.loads(shown.out[shown.out.index("{") :])["name"].startswith("\x1b]0;title")


def test_a_terminal_of_ascii_is_given_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    write("für")
    sys.stdout.flush()
    assert raw.getvalue() == b"f\\xfcr\n"


def log_line(message: str, *args: object) -> str:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, message, args, None)
    return CleanFormatter("%(message)s").format(record)


def test_arguments_of_a_log_line_stay_in_it() -> None:
    line = log_line("%s %r %d %.1f", HOSTILE, [HOSTILE], 3, 0.5)
    assert "\n" not in line
    assert is_clean(line)
    assert line.endswith("3 0.5")
    assert log_line("%s", OSError("a\nFORGED https://u:s3cr3t@h")) == (
        "a\\nFORGED https://[removed]h"
    )


def test_our_own_errors_and_tables_keep_their_lines_in_a_log() -> None:
    assert log_line("failed: %s", ConfigError("two\n  a\n  b")) == "failed: two\n  a\n  b"
    assert log_line("table\n%s", join_lines(["a", "b"])) == "table\n  a\n  b"


def test_a_traceback_is_clean() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "no", (), sys.exc_info())
    text = CleanFormatter("%(message)s").format(record)
    assert is_clean(text)
    assert "\nFORGED" not in text
    assert "Traceback" in text


def test_a_piece_of_a_log_keeps_its_lines() -> None:
    assert keep_lines("a\n\tb\x1b[2J\n") == "a\n    b\\x1b[2J\n"
