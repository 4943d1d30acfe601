"""benchmarks/measures.py on small trees whose counts are known by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.measures import COMPLEX, PACKAGES, Repeat, find_repeats, main, read_file

MODULE = '''\
"""A module
of two lines."""

import os  # read from here
from sys import (
    argv,
)

# A comment.
LIMIT = 3  # not a comment line
"""What the limit is."""


class Box:
    """A box."""

    def __init__(self, size: int, *items: int, lid=None, **more: str) -> None:
        # Why.
        self.size = size

        self.text = "# no comment"

    @staticmethod
    def make(size): return Box(size)

    @classmethod
    async def find(cls) -> Box:
        def inner(a, /, b: int, *, c): ...
        return lambda x, y: inner
'''

BRANCHES = """\
def plain():
    return [x for x in () if x] and 1 or 2

def loops(x):
    for _ in x:
        while x:
            if x: break
            elif not x: pass
            else: pass
    else: pass

def tries():
    try: pass
    except OSError: pass
    except ValueError: pass
    else: pass
    finally: pass
    with open("x"): pass

def matches(x):
    match x:
        case 1: pass
        case [2, *_]: pass
        case _ if x: pass
    match x:
        case 1: pass
        case y: pass

def outer():
    def inner():
        if 1: pass
    async def other():
        async for _ in (): pass
    class C:
        def method(self): pass
"""


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """Run the command; give its first table by row, with the head under ''."""
    assert main(list(arguments)) == 0
    rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    cells = [re.split(r"\s{2,}", row.strip()) for row in rows]
    assert len({len(row) for row in rows}) == 1, "the columns are aligned"
    return {"": cells[0]} | {row[0]: row[1:] for row in cells[1:]}


def test_lines_are_told_apart() -> None:
    file = read_file("fqgan_dist/x.py", MODULE)
    assert file.num_lines == 21
    assert file.num_docstring_lines == 4
    assert file.num_comment_lines == 2
    # Without imports and what stands beside code.
    assert [line for _, line in file.code][:3] == [
        "LIMIT = 3",
        "class Box:",
        "def __init__(self, size: int, *items: int, lid=None, **more: str) -> None:",
    ]
    assert (21, 'self.text = "# no comment"') in file.code


def test_functions_and_their_parameters_are_counted() -> None:
    functions = read_file("fqgan_dist/x.py", MODULE).functions
    counts = {
        f.place: (f.num_lines, f.num_parameters, f.num_typed, f.is_return_typed) for f in functions
    }
    assert counts == {
        "fqgan_dist/x.py:17 __init__": (5, 4, 3, True),
        "fqgan_dist/x.py:24 make": (1, 1, 0, False),
        "fqgan_dist/x.py:27 find": (3, 0, 0, True),
        "fqgan_dist/x.py:28 inner": (1, 3, 1, False),
    }


def test_complexity_is_mccabes_as_ruff_counts_it(tmp_path: Path) -> None:
    functions = read_file("x.py", BRANCHES).functions
    counts = {f.place.split()[1]: f.complexity for f in functions}
    assert counts == {
        "plain": 1,
        "loops": 5,
        "tries": 4,
        "matches": 5,
        "outer": 6,
        "inner": 2,
        "other": 2,
        "method": 1,
    }
    (tmp_path / "x.py").write_text(BRANCHES)
    command = "ruff check --isolated --select C901 --output-format json --exit-zero --config"
    ruff = subprocess.run(
        [sys.executable, "-m", *command.split(), "lint.mccabe.max-complexity=0", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [
        re.match(r"`(\w+)` is too complex \((\d+)", each["message"])
        for each in json.loads(ruff.stdout)
    ]
    assert {each[1]: int(each[2]) for each in found if each} == counts


def lines(*names: str) -> str:
    return "".join(f"{name} = 1\n" for name in names)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (lines(*"abcdef"), lines(*"xabcdef"), [(1, 2, 6)]),
        (lines(*"abcdefgh"), lines(*"abcdefgx"), [(1, 1, 7)]),
        (lines(*"abcde"), lines(*"abcde"), []),
        # What is left out neither counts nor parts a run.
        (
            lines(*"abc") + "# why\n\nimport os\n" + lines(*"def"),
            lines(*"abcdef"),
            [(1, 1, 6)],
        ),
        (lines(*"abc") + "x = [\n]\n" + lines(*"de"), lines(*"abc") + "x = [\n]\n", []),
        (lines(*"abcdef") + lines(*"xy") + lines(*"abcdef"), "", [(1, 9, 6)]),
        # Equal lines one after the other repeat nothing but themselves.
        (lines(*"aaaaaaaa"), "", []),
    ],
)
def test_repeated_runs_are_as_long_as_can_be(
    one: str, other: str, expected: list[tuple[int, int, int]]
) -> None:
    files = [read_file("one.py", one), read_file("other.py", other)]
    second = "one.py" if not other else "other.py"
    assert find_repeats(files) == [
        Repeat(f"one.py:{i}", f"{second}:{j}", length) for i, j, length in expected
    ]


def test_a_table_has_each_package_and_the_total(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "def long(a, b, c, d, e, f, g):\n" + textwrap.indent(lines(*["x"] * 60), "    ")
    branchy = "def branchy(a):\n" + "".join(f"    if a == {i}: return\n" for i in range(COMPLEX))
    root = write_tree(
        tmp_path,
        {
            "fqgan_dist/x.py": MODULE,
            "fqgan_dist/data/long.py": long,
            "data_tools/y.py": branchy,
            "cluster/submit": "#!/usr/bin/env python3\nx = 1\n",
            "cluster/Dockerfile": "FROM x\n",
            "tests/z.py": "x = 1\n",
        },
    )
    found = table(capsys, str(root))
    assert found[""] == [*PACKAGES, "total"]
    assert found["files"] == ["2", "1", "1", "4"]
    assert found["non-blank lines"] == ["82", "11", "2", "95"]
    assert found["non-blank lines, most"] == ["61", "11", "2", "61"]
    assert found["of code"] == ["76", "11", "1", "88"]
    assert found["docstrings"] == ["4.9 %", "0.0 %", "0.0 %", "4.2 %"]
    assert found["comments"] == ["2.4 %", "0.0 %", "50.0 %", "3.2 %"]
    assert found["functions"] == ["5", "1", "0", "6"]
    assert found["lines, median"] == ["3", "11", "-", "4"]
    assert found["lines, 90 %"] == ["61", "11", "-", "61"]
    assert found["over 60 lines"] == ["1", "0", "0", "1"]
    assert found["parameters, median"] == ["3", "1", "-", "2"]
    assert found["parameters, most"] == ["7", "1", "0", "7"]
    assert found["over 6 parameters"] == ["1", "0", "0", "1"]
    assert found["typed parameters"] == ["26.7 %", "0.0 %", "-", "25.0 %"]
    assert found["typed returns"] == ["40.0 %", "0.0 %", "-", "33.3 %"]
    assert found["complexity, most"] == ["2", "11", "0", "11"]
    assert found["over 10 complexity"] == ["0", "1", "0", "1"]
    assert table(capsys, str(root), "--short").items() < found.items()


def test_the_places_behind_the_table_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "fqgan_dist/data/one.py": lines(*"abcdef"),
        "fqgan_dist/data/deep/two.py": lines(*"abcdef"),
        "fqgan_dist/three.py": "def f(a, b, c, d, e, f, g):\n    pass\n",
    }
    main([str(write_tree(tmp_path, files))])
    output = capsys.readouterr().out
    # Files, lines, lines of code, docstrings, comments, functions ... repeated runs.
    assert re.search(r"^fqgan_dist/data +2 +12 +12 +0.0 % +0.0 % +0 .* 1$", output, re.MULTILINE)
    assert "    6  fqgan_dist/data/deep/two.py:1 = fqgan_dist/data/one.py:1\n" in output
    assert "    7  fqgan_dist/three.py:1 f\n" in output
    assert "functions over 60 lines\n    -  none\n" in output


def test_two_checkouts_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_tree(tmp_path / "before", {"fqgan_dist/x.py": lines(*"abc")})
    after = write_tree(
        tmp_path / "after", {"fqgan_dist/x.py": lines(*"ab"), "cluster/y.py": lines("a")}
    )
    found = table(capsys, str(after), "--against", str(before))
    assert found["files"] == ["1", "0", "0 -> 1", "1 -> 2"]
    assert found["non-blank lines"] == ["3 -> 2", "0", "0 -> 1", "3"]


def test_a_folder_that_is_no_checkout_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--against", str(tmp_path)])
    assert f"{tmp_path} is no checkout: it has none of fqgan_dist" in capsys.readouterr().err
