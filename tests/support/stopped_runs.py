"""Run a `fqgan` command that stops itself (SIGSTOP) when it is about to write an object.

    python tests/support/stopped_runs.py FRAGMENT COUNT fqgan-argument ...

It stops when it is about to write, for the COUNT-th time, an object whose URI holds the fragment,
and goes on with that very write at SIGCONT.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from fqgan_dist.cli import main
from fqgan_dist.storage.storage import Storage


def stop_before_write(fragment: str, count: int) -> None:
    """Let this process stop at a write."""
    seen = 0

    def wrap(write: Any) -> Any:
        def stop_and_write(storage: Storage, path: str, data: bytes, **former: bytes) -> None:
            nonlocal seen
            seen += fragment in storage.uri(path)
            if fragment in storage.uri(path) and seen == count:
                os.kill(os.getpid(), signal.SIGSTOP)
            write(storage, path, data, **former)

        return stop_and_write

    for name in ("write_bytes", "create_bytes", "replace_bytes"):
        setattr(Storage, name, wrap(getattr(Storage, name)))


if __name__ == "__main__":
    stop_before_write(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
