"""Run the same `fqgan` command again and again, each time killed at another point.

    python tests/support/killed_runs.py KILL_POINTS_JSON fqgan-argument ...

A session is a fork of this process, which has imported the library and nothing else: a process
that really dies of SIGKILL, without the seconds that a new interpreter spends on imports. A point
is [fragment, count]: the session dies when it is about to write, for the count-th time, an object
whose URI holds the fragment. What it wrote before stays, what was to come never does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import transformers.models.dinov2.modeling_dinov2  # noqa: F401  seconds, once instead of always
from torch.utils.tensorboard.writer import SummaryWriter  # noqa: F401  the same

from fqgan_dist.cli import main
from fqgan_dist.orchestration import driver  # noqa: F401  the command imports it late
from fqgan_dist.storage.storage import Storage


def die_before_write(fragment: str, count: int) -> None:
    """Let this process die at a write."""
    seen = 0

    def wrap(write: Any) -> Any:
        def write_or_die(storage: Storage, path: str, data: bytes) -> None:
            nonlocal seen
            seen += fragment in storage.uri(path)
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            write(storage, path, data)

        return write_or_die

    for name in ("write_bytes", "create_bytes"):
        setattr(Storage, name, wrap(getattr(Storage, name)))


def run_session(fragment: str, count: int, arguments: list[str]) -> int:
    """Run the command in a child until it dies, and return the signal that it died of."""
    child = os.fork()
    if child == 0:
        die_before_write(fragment, count)
        os._exit(main(arguments))
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def run_all(kill_points: list[tuple[str, int]], arguments: list[str]) -> int:
    """Run one session per kill point; fail if one of them was not killed."""
    for fragment, count in kill_points:
        if run_session(fragment, count, arguments) != signal.SIGKILL:
            sys.stderr.write(f"the session was not killed at write {count} of {fragment!r}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_all(json.loads(sys.argv[1]), sys.argv[2:]))
