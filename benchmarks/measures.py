"""Measures of the production code: sizes, functions, hints, comments, complexity, repetition.

    python benchmarks/measures.py [ROOT] [--against ROOT] [--short]

ROOT is a checkout, this one unless told. With `--against` each cell is `before -> after`: make the
other checkout with `git worktree add --detach DIR COMMIT`. `make check` ends with the short table.

How it is counted: every Python file of `fqgan_dist`, `data_tools` and `cluster`; shares are of
lines that are not blank. Docstrings are all strings that stand alone, those of fields included;
comments are lines with a comment and nothing else. A function's lines go from `def` to its end, its
parameters are all but `self` and `cls`; lambdas are not functions. Complexity is McCabe's, as
ruff's C901 counts it. A repeated run is a pair of places with six or more equal lines of code, as
long as can be; blank lines, imports, comments, docstrings and lines of brackets alone are left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import itertools
import math
import re
import statistics
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("fqgan_dist", "data_tools", "cluster")
LONG_FUNCTION = 60
MANY_PARAMETERS = 6
COMPLEX = 10
REPEATED_LINES = 6

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """What is counted of a function."""

    place: str
    num_lines: int
    num_parameters: int
    num_typed: int
    """Of its parameters."""
    is_return_typed: bool
    complexity: int


@dataclass(frozen=True)
class SourceFile:
    """What is counted of a file."""

    path: str
    """From the root of the checkout."""
    num_lines: int
    """Not blank, as all counts of lines but a function's."""
    num_docstring_lines: int
    num_comment_lines: int
    functions: Sequence[Function]
    code: Sequence[tuple[int, str]]
    """Number and text of the lines in which repeated runs are looked for."""

    @property
    def package(self) -> str:
        """The first of `part`."""
        return self.path.partition("/")[0]

    @property
    def part(self) -> str:
        """The package or the package's part, as the import table names them."""
        return "/".join(self.path.split("/")[:-1][:2])


@dataclass(frozen=True)
class Repeat:
    """Two places with the same lines of code."""

    first: str
    second: str
    num_lines: int


def read_checkout(root: Path) -> list[SourceFile]:
    """Read the production code of a checkout; a package that it lacks has no files.

    Raises:
        FileNotFoundError: it has none of the packages.
    """
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*"))]
    files = [
        read_file(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
        if _is_python(path)
    ]
    if not files:
        raise FileNotFoundError(f"{root} is no checkout: it has none of {', '.join(PACKAGES)}")
    return files


def _is_python(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".py", ""):
        return False
    return path.suffix == ".py" or path.read_bytes()[:100].startswith(b"#!/usr/bin/env python")


def read_file(path: str, text: str) -> SourceFile:
    """Count what there is in a file."""
    tree = ast.parse(text)
    lines = dict(enumerate(text.splitlines(), start=1))
    code = {number: line.strip() for number, line in lines.items() if line.strip()}
    num_lines = len(code)
    docstrings = [node for node in ast.walk(tree) if _is_docstring(node)]
    num_docstring_lines = _drop(code, docstrings)
    num_comment_lines = _drop_comments(code, text)
    _drop(code, [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)])
    return SourceFile(
        path=path,
        num_lines=num_lines,
        num_docstring_lines=num_docstring_lines,
        num_comment_lines=num_comment_lines,
        functions=list(_find_functions(tree, path)),
        code=[(number, line) for number, line in code.items() if re.search(r"\w", line)],
    )


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _drop(code: dict[int, str], nodes: Sequence[Any]) -> int:
    """Take the lines of some nodes out; return how many they were."""
    before = len(code)
    for node in nodes:
        for number in range(node.lineno, node.end_lineno + 1):
            code.pop(number, None)
    return before - len(code)


def _drop_comments(code: dict[int, str], text: str) -> int:
    """Take comments out, and the lines that are nothing else; return how many these were."""
    before = len(code)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        number = token.start[0]
        if token.type == tokenize.COMMENT:
            code[number] = token.line[: token.start[1]].strip()
            if not code[number]:
                del code[number]
    return before - len(code)


def _find_functions(tree: ast.AST, path: str) -> Iterator[Function]:
    for owner in ast.walk(tree):
        for node in ast.iter_child_nodes(owner):
            if isinstance(node, FunctionNode):
                parameters = _find_parameters(node, is_method=isinstance(owner, ast.ClassDef))
                assert node.end_lineno is not None, "parsed from text"
                yield Function(
                    place=f"{path}:{node.lineno} {node.name}",
                    num_lines=node.end_lineno - node.lineno + 1,
                    num_parameters=len(parameters),
                    num_typed=sum(each.annotation is not None for each in parameters),
                    is_return_typed=node.returns is not None,
                    complexity=1 + sum(map(_count_branches, node.body)),
                )


def _find_parameters(node: FunctionNode, *, is_method: bool) -> list[ast.arg]:
    spec = node.args
    decorators = {each.id for each in node.decorator_list if isinstance(each, ast.Name)}
    positional = [*spec.posonlyargs, *spec.args]
    if is_method and "staticmethod" not in decorators:
        positional = positional[1:]
    return [*positional, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]


def _count_branches(statement: ast.stmt) -> int:
    """Count a statement's branches, those of the statements in it included."""
    return sum(
        isinstance(
            node,
            ast.If
            | ast.For
            | ast.AsyncFor
            | ast.While
            | ast.ExceptHandler
            | ast.match_case
            | FunctionNode,
        )
        + (isinstance(node, ast.Try | ast.TryStar) and bool(node.orelse))
        - (isinstance(node, ast.Match) and _is_wildcard(node.cases[-1]))
        for node in ast.walk(statement)
    )


def _is_wildcard(case: ast.match_case) -> bool:
    is_any = isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None
    return is_any and case.guard is None


def find_repeats(files: Sequence[SourceFile]) -> list[Repeat]:
    """Find pairs of places whose code is the same for some lines, each as long as it can be."""
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    texts = [[line for _, line in file.code] for file in files]
    for index, lines in enumerate(texts):
        for start in range(len(lines) - REPEATED_LINES + 1):
            places[tuple(lines[start : start + REPEATED_LINES])].append((index, start))
    repeats = []
    for found in places.values():
        for (one, i), (other, j) in itertools.combinations(found, 2):
            if i and j and texts[one][i - 1] == texts[other][j - 1]:
                continue  # inside a longer run
            length = _count_equal(texts[one][i:], texts[other][j:])
            if one == other:
                length = min(length, j - i)  # a run does not repeat itself
            if length >= REPEATED_LINES:
                first, second = (
                    f"{files[index].path}:{files[index].code[start][0]}"
                    for index, start in ((one, i), (other, j))
                )
                repeats.append(Repeat(first, second, length))
    return sorted(repeats, key=lambda repeat: (-repeat.num_lines, repeat.first))


def _count_equal(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _median(values: Sequence[int]) -> str:
    return f"{statistics.median(values):g}" if values else "-"


def _percentile(values: Sequence[int], percent: int) -> str:
    """Give the least value that so many percent of all do not exceed."""
    return str(sorted(values)[math.ceil(len(values) * percent / 100) - 1]) if values else "-"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


@dataclass(frozen=True)
class Row:
    """One measure."""

    name: str
    measure: Callable[[Sequence[SourceFile], Sequence[Function]], object]
    is_short: bool = False


ROWS = (
    Row("files", lambda files, _: len(files), is_short=True),
    Row("non-blank lines, most", lambda files, _: max((f.num_lines for f in files), default=0)),
    Row("non-blank lines", lambda files, _: sum(f.num_lines for f in files), is_short=True),
    Row(
        "  of code",
        lambda files, _: sum(
            f.num_lines - f.num_docstring_lines - f.num_comment_lines for f in files
        ),
        is_short=True,
    ),
    Row(
        "  docstrings",
        lambda files, _: _share(
            sum(f.num_docstring_lines for f in files), sum(f.num_lines for f in files)
        ),
        is_short=True,
    ),
    Row(
        "  comments",
        lambda files, _: _share(
            sum(f.num_comment_lines for f in files), sum(f.num_lines for f in files)
        ),
        is_short=True,
    ),
    Row("functions", lambda _, functions: len(functions), is_short=True),
    Row("  lines, median", lambda _, functions: _median([f.num_lines for f in functions]), True),
    Row("  lines, 90 %", lambda _, functions: _percentile([f.num_lines for f in functions], 90)),
    Row(
        f"  over {LONG_FUNCTION} lines",
        lambda _, functions: sum(f.num_lines > LONG_FUNCTION for f in functions),
        is_short=True,
    ),
    Row("  parameters, median", lambda _, fs: _median([f.num_parameters for f in fs])),
    Row("  parameters, most", lambda _, fs: max((f.num_parameters for f in fs), default=0)),
    Row(
        f"  over {MANY_PARAMETERS} parameters",
        lambda _, functions: sum(f.num_parameters > MANY_PARAMETERS for f in functions),
        is_short=True,
    ),
    Row(
        "  typed parameters",
        lambda _, functions: _share(
            sum(f.num_typed for f in functions), sum(f.num_parameters for f in functions)
        ),
    ),
    Row(
        "  typed returns",
        lambda _, functions: _share(sum(f.is_return_typed for f in functions), len(functions)),
    ),
    Row("  complexity, median", lambda _, functions: _median([f.complexity for f in functions])),
    Row("  complexity, most", lambda _, fs: max((f.complexity for f in fs), default=0)),
    Row(
        f"  over {COMPLEX} complexity",
        lambda _, functions: sum(f.complexity > COMPLEX for f in functions),
        is_short=True,
    ),
    Row("repeated runs", lambda files, _: len(find_repeats(files)), is_short=True),
)


def measure(files: Sequence[SourceFile], *, is_short: bool = False) -> dict[str, list[str]]:
    """Measure each package and, last, all of them."""
    groups = [[file for file in files if file.package == package] for package in PACKAGES]
    return {
        row.name: [_fill_cell(row, group) for group in [*groups, list(files)]]
        for row in ROWS
        if row.is_short or not is_short
    }


def _fill_cell(row: Row, files: Sequence[SourceFile]) -> str:
    return str(row.measure(files, [function for file in files for function in file.functions]))


def compare(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, list[str]]:
    """Put the cells of two tables side by side where they differ."""
    return {
        name: [
            new if old == new else f"{old} -> {new}"
            for old, new in zip(before[name], after[name], strict=True)
        ]
        for name in after
    }


def to_table(head: Sequence[str], rows: dict[str, list[str]]) -> str:
    """Lay rows out below their head, in columns."""
    lines = [list(head), *([name, *cells] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def to_lists(files: Sequence[SourceFile]) -> str:
    """Measure the parts, and name the places that a reader would look at first."""
    parts: dict[str, list[SourceFile]] = defaultdict(list)
    for file in files:
        parts[file.part].append(file)
    rows = [row for row in ROWS if row.is_short]
    sizes = {
        name: [_fill_cell(row, group) for row in rows] for name, group in sorted(parts.items())
    }
    head = ["", *(row.name.strip() for row in rows)]
    largest = sorted(files, key=lambda file: -file.num_lines)[:10]
    functions = [function for file in files for function in file.functions]
    lists = {
        "largest files": [f"{file.num_lines:5d}  {file.path}" for file in largest],
        f"functions over {LONG_FUNCTION} lines": [
            f"{f.num_lines:5d}  {f.place}" for f in functions if f.num_lines > LONG_FUNCTION
        ],
        f"functions over {MANY_PARAMETERS} parameters": [
            f"{f.num_parameters:5d}  {f.place}"
            for f in functions
            if f.num_parameters > MANY_PARAMETERS
        ],
        f"functions over {COMPLEX} complexity": [
            f"{f.complexity:5d}  {f.place}" for f in functions if f.complexity > COMPLEX
        ],
        "repeated runs": [
            f"{repeat.num_lines:5d}  {repeat.first} = {repeat.second}"
            for repeat in find_repeats(files)
        ],
    }
    texts = ["\n".join([name, *(lines or ["    -  none"])]) for name, lines in lists.items()]
    return "\n\n".join([to_table(head, sizes), *texts])


def main(arguments: Sequence[str]) -> int:
    """Print the table, and unless it is short the lists behind it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("root", type=Path, nargs="?", default=here, help="a checkout")
    parser.add_argument("--against", type=Path, help="the checkout before")
    parser.add_argument("--short", action="store_true", help="the most telling rows only")
    options = parser.parse_args(arguments)
    try:
        files = read_checkout(options.root)
        before = None if options.against is None else read_checkout(options.against)
    except FileNotFoundError as error:
        parser.error(str(error))
    rows = measure(files, is_short=options.short)
    if before is not None:
        rows = compare(measure(before, is_short=options.short), rows)
    print(to_table(["", *PACKAGES, "total"], rows))
    if not options.short:
        print(f"\n{to_lists(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
