from __future__ import annotations

import os
from pathlib import Path

import pytest

from fqgan_dist.storage.documents import MAX_DOCUMENT_BYTES, parse_json, read_document
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage


@pytest.mark.parametrize("text", ['{"a": [1, "]"]}', "3", '"\\u00e4"', "[" * 99 + "]" * 99])
def test_json_is_parsed(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested deeper than 100 levels"),
        ("9" * 5000, "digits"),
        ('"\\ud800"', "surrogates not allowed"),
        (b"\xff", "utf-8"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_no_json_of_bounded_depth_is_a_value_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_a_document_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"{}")
    assert read_document(Storage(tmp_path), "x") == b"{}"
    os.truncate(tmp_path / "x", 2**42)
    with pytest.raises(RefusedObjectError, match=f"more than {MAX_DOCUMENT_BYTES} bytes"):
        read_document(Storage(tmp_path), "x")
