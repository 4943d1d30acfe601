"""What users are told of wrong data is what was read and agreed to, in one text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.user_errors import collect_errors

GOLDEN = Path(__file__).parents[2] / "golden" / "user_errors.txt"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return collect_errors(tmp_path_factory.mktemp("errors"))


def test_the_text_is_the_recorded_one(text: str) -> None:
    assert text.splitlines() == GOLDEN.read_text().splitlines(), "`make golden` writes it anew"


def test_each_is_an_error_that_was_meant(text: str) -> None:
    codes = re.findall(r"^\[exit (\w+)\]$", text, re.MULTILINE)
    assert len(codes) > 100
    assert set(codes) == {"1", "2"}
    assert "Traceback" not in text
    assert "secret" not in re.sub(r"^\$ .*$", "", text, flags=re.MULTILINE)


def test_remedies_are_those_of_the_command(text: str) -> None:
    for part in text.split("\n$ ")[1:]:
        command, _, said = part.partition("\n")
        if command.startswith("fqgan run"):
            options = (
                r"(format|files|subfolder|root|image_key|class_key|class_map|id_key|split_key)="
            )
            assert not re.search(rf"(?<![\w.]){options}", said), command
