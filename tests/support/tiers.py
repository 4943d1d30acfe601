"""The full tier: what is in it and why, and equal parts of it.

python tests/support/tiers.py       the list for CONTRIBUTING.md
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TESTS_DIR = Path(__file__).resolve().parents[1]

SECONDS: dict[str, int] = {
    "distributed/test_engine_deepspeed.py": 200,
    "distributed/test_loss_groups.py": 220,
    "distributed/test_restore_layouts.py": 150,
    "integration/test_actor_pool_kills.py": 150,
    "integration/test_capacity.py": 120,
    "integration/test_elastic.py": 400,
    "integration/test_full_disks.py": 5,
    "integration/test_fuzzing.py": 350,
    "integration/test_hangs.py": 240,
    "integration/test_layouts_s3.py": 50,
    "integration/test_notice.py": 500,
    "integration/test_other_readers.py": 20,
    "integration/test_outages.py": 350,
    "integration/test_pipeline.py": 100,
    "integration/test_pool_hangs.py": 120,
    "integration/test_ray_jobs.py": 420,
    "integration/test_ray_two_nodes.py": 850,
    "integration/test_zombies.py": 150,
    "unit/teachers/test_clip.py": 20,
}
"""What the full tier's tests of a file take on two cores, about, for parts of one length; a file
that is not named counts as DEFAULT_SECONDS."""
DEFAULT_SECONDS = 60


def split(files: Sequence[str], parts: int, seconds: Mapping[str, int] = SECONDS) -> list[set[str]]:
    """Divide files into parts that take about as long as each other, always in the same way.

    Args:
        files: paths below `tests/`.
        parts: how many.
        seconds: what a file takes.
    """
    divided: list[set[str]] = [set() for _ in range(parts)]
    loads = [0] * parts
    cost = {file: seconds.get(file, DEFAULT_SECONDS) for file in files}
    for file in sorted(cost, key=lambda name: (-cost[name], name)):
        lightest = loads.index(min(loads))
        divided[lightest].add(file)
        loads[lightest] += cost[file]
    return divided


def parse_part(text: str) -> tuple[int, int]:
    """Read `2/5` as the second of five parts, (1, 5).

    Raises:
        ValueError: it is not of that form.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"part {text!r}: expected K/N with K from 1 to N, for example 2/5")
    return int(number) - 1, int(count)


def find_reasons(folder: Path = TESTS_DIR) -> dict[str, list[str]]:
    """Collect why tests are in the full tier: path below the folder -> reasons."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        reasons = list(_find_in(path))
        if reasons:
            found[path.relative_to(folder).as_posix()] = reasons
    return found


def _find_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="mark"), attr="full"),
                args=[ast.Constant(value=str(reason))],
            ):
                yield reason
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="mark"), attr="full")):
                raise ValueError(f"{path}:{node.lineno}: pytest.mark.full wants one reason, a text")


def render_list() -> str:
    """Write the list for CONTRIBUTING.md."""
    lines = [
        f"- `{file}`: {'; '.join(dict.fromkeys(reasons))}"
        for file, reasons in find_reasons().items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(render_list() + "\n")
