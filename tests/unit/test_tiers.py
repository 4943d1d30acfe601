"""The tiers of the tests: every test is in one, and the parts of the full one cover it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiers import find_reasons, parse_part, render_list, split

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_contributing_lists_the_full_tier_with_its_reasons() -> None:
    assert render_list() in CONTRIBUTING.read_text(encoding="utf-8"), (
        "put the output of `python tests/support/tiers.py` into CONTRIBUTING.md"
    )


def test_parts_are_disjoint_cover_all_and_take_as_long_as_each_other() -> None:
    seconds = {f"file-{number}": number * 10 for number in range(1, 30)}
    files = [*seconds, "unknown"]
    parts = split(files, 5, seconds)
    assert sorted(file for part in parts for file in part) == sorted(files)
    lengths = [sum(seconds.get(file, 60) for file in part) for part in parts]
    assert max(lengths) - min(lengths) < 100
    assert split(list(reversed(files)), 5, seconds) == parts


def test_a_part_is_named_by_its_number() -> None:
    assert parse_part("2/5") == (1, 5)
    for text in ("0/5", "6/5", "2", "a/b", "2/", "-1/5"):
        with pytest.raises(ValueError, match="expected K/N"):
            parse_part(text)


def test_a_test_without_a_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text("@pytest.mark.full('it is long')\ndef test(): ...\n")
    assert find_reasons(tmp_path) == {"test_good.py": ["it is long"]}
    (tmp_path / "test_bad.py").write_text("@pytest.mark.full()\ndef test(): ...\n")
    with pytest.raises(ValueError, match=r"test_bad\.py:1: pytest\.mark\.full wants one reason"):
        find_reasons(tmp_path)
