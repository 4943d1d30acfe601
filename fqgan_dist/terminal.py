"""What a terminal or a log file is given: text of which no part can pass for something else.

Names, metrics and messages come from files that anybody may have written. An escape sequence in
one could clear the screen or set its title, a line break forge a line, a bidirectional mark turn
one around: what is not printable is spelled out, as `repr` does it, and lines have a greatest
length.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from fqgan_dist.credentials import redact

_MAX_LINE_LENGTH = 4000
_CONTINUED = "  "


class Lines(str):
    """Text whose line breaks are our own; each of its lines is printable."""

    __slots__ = ()


def printable(text: str) -> str:
    r"""Spell out what is not printable (`\x1b`, `\n`, lone bytes); the text becomes one line."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def keep_lines(text: str) -> str:
    """Make a piece of a log printable; its lines stay lines, as its writer made them clean."""
    return "\n".join(map(printable, text.replace("\t", "    ").split("\n")))


def join_lines(lines: Iterable[str]) -> Lines:
    """Make text of lines, each fit for a terminal: printable, bounded, without credentials."""
    return Lines("\n".join(map(_clean_line, lines)))


def clean_text(text: str) -> Lines:
    """Make a message of several lines fit for a terminal and a log.

    Whose line breaks they are cannot be told, so every line but the first is indented: none can
    pass for a line of its own.
    """
    first, *others = text.split("\n")
    return join_lines(
        [first, *(line if not line or line[0] == " " else _CONTINUED + line for line in others)]
    )


def write(text: str) -> None:
    """Write text and a line break to the standard output; what is not `Lines` is cleaned."""
    _write(sys.stdout, text if isinstance(text, Lines) else clean_text(text))


def write_json(value: Any) -> None:
    """Write plain values as JSON, which spells out all that is not printable, to the output."""
    _write(sys.stdout, json.dumps(value, indent=1).replace("\x7f", "\\u007f"))


def write_error(error: Exception) -> None:
    """Write an error for the user to the standard error."""
    _write(sys.stderr, clean_text(f"{type(error).__name__}: {error}"))


class CleanFormatter(logging.Formatter):
    """A formatter of which no line can be forged by what comes from files.

    The words of a line are a module's own; its arguments become one line each, if they are not
    `Lines`, our own errors or numbers.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a copy of the record, as other handlers get it too."""
        clean = copy.copy(record)
        if isinstance(record.args, Mapping):
            clean.args = {name: _clean_value(value) for name, value in record.args.items()}
        else:
            clean.args = tuple(map(_clean_value, record.args or ()))
        clean.exc_text = None  # as another formatter made it
        return clean_text(super().format(clean))


class _LogValue:
    """An argument of a log line; `%s` and `%r` of it are printable."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return _clean_line(str(self._value))

    def __repr__(self) -> str:
        return _clean_line(repr(self._value))


def _clean_value(value: Any) -> Any:
    if isinstance(value, int | float | Lines):
        return value
    # Our own errors are made of lines that are clean.
    return Lines(str(value)) if getattr(value, "is_clean", False) else _LogValue(value)


def _write(stream: TextIO, text: str) -> None:
    # A terminal that is set to ASCII shows the escapes of what it cannot show.
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _clean_line(line: str) -> str:
    # Cut twice: the rest of a megabyte need not be cleaned, and escapes are longer than what they
    # stand for.
    cut = line[:_MAX_LINE_LENGTH]
    clean = printable(redact(cut))[:_MAX_LINE_LENGTH]
    return clean if len(line) <= _MAX_LINE_LENGTH else f"{clean} ... ({len(line)} characters)"
