from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fqgan_dist.config import read_config_file
from fqgan_dist.errors import ConfigError
from fqgan_dist.yaml_text import MAX_TEXT_BYTES, parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5]", {"a": 1, "b": ["x", 2.5]}),
        (
            "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a",
            {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}},
        ),
        ("", None),
        ("'[['", "[["),
    ],
)
def test_values_are_parsed(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


def test_each_alias_is_a_copy() -> None:
    values = parse_yaml("a: &a {x: 1}\nb: *a")
    values["a"]["x"] = 2
    assert values["b"] == {"x": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "more than 20000 values"),
        (MERGES, "more than 20000 values"),
        (CHAIN, "more than 50 levels"),
        ("[" * 100_000, "more than 50 levels"),
        ("- " * 10_000, "more than 50 levels"),
        ("a: &a [*a]", "an alias inside of itself"),
        ("a: &a {b: *a}", "an alias inside of itself"),
        ("x" * (MAX_TEXT_BYTES + 1), "expected at most"),
        ("a: 1\na: 2", "a is given twice"),
        ("!!bool maybe", "not of its kind"),
        ("!!int ''", "not of its kind"),
        ("2001-99-99", "not of its kind"),
        ("9" * 5000, "not of its kind"),
        ("!!timestamp x", "not of its kind"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ('"\\ud800"', "not of its kind"),
        ("a: *nothing", "undefined alias"),
        ("? [a, b]\n: 1", "unhashable"),
        ("a: b: c", "not allowed here"),
        ("\x1b", "special characters"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_bombs_and_what_is_no_yaml_are_value_errors(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)


@pytest.mark.parametrize("text", [LAUGHS, "[" * 100_000, "x: " + "y" * MAX_TEXT_BYTES])
def test_a_bomb_in_a_file_of_settings_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read as YAML"):
        read_config_file(path)
    base = tmp_path / "y.yaml"
    base.write_text("base: x.yaml")
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read as YAML"):
        read_config_file(base)


@pytest.mark.parametrize(
    "text", ["0x" + "f" * 5000, "? 0x" + "f" * 5000 + "\n: 1", ":".join(["59"] * 999)]
)
def test_numbers_too_long_to_be_written_again_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a whole number of [0-9]+ bits"):
        parse_yaml(text)


def test_values_are_counted_while_they_are_read() -> None:
    # A list is refused at its first value too many, not at its end.
    with pytest.raises(ValueError, match=r"more than 20000 values(.|\n)*column 40000"):
        parse_yaml(f"[{','.join(['0'] * 60_000)}]")
