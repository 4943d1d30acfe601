"""What Ray prints of its own accord, kept short enough that our lines are seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Where the driver prints what is published as an error. Ray 2.60 has no setting for it.
from ray._private import worker

_REST = "(its last lines are left out here; they are in raylet.out of that node)"


@contextmanager
def short_raylet_errors() -> Iterator[None]:
    """Show one line of a raylet that died during a block, not the forty of its state."""
    print_all = worker.print_to_stdstream

    def print_short(data: Mapping[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") == "raylet":
            data = {**data, "lines": [_shorten(str(text)) for text in data["lines"]]}
        print_all(data, ignore_prefix=ignore_prefix)

    worker.print_to_stdstream = print_short
    try:
        yield
    finally:
        worker.print_to_stdstream = print_all


def _shorten(text: str) -> str:
    first, _, rest = text.partition(" lines of the Raylet logs:")
    if not rest:
        return text
    first = first.rpartition(" Last ")[0] or first
    return f"{first} {_REST}"
