"""Jobs of `fqgan-data` that die: in a reader, or at a chosen system call.

    python tests/support/shard_jobs.py JOBS_JSON

JOBS_JSON is a list of steps, each a list of sessions that run at the same time. A session is
{"arguments": [...], "die": [call, count, after] or null}: it dies of SIGKILL at the count-th call
of that name, before or after it took effect. The arguments "copy FROM TO" copy a folder. Sessions
are forks of this process, which has imported the library and nothing else, so that each starts at
once. Written out: a list of steps, each a list of [exit code or minus the signal, standard error].
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from typing import IO, Any

import s3fs  # noqa: F401  seconds, once instead of in every session

from data_tools.cli import main
from fqgan_dist.sharding.listing import Place
from fqgan_dist.storage.storage import Storage

STORAGE_CALLS = ("create_bytes", "write_bytes")
SYSTEM_CALLS = ("fsync", "link", "replace", "unlink")
"""What a local storage does: a file is written and synced, gets its name, and loses its old one."""


class KillingReader:
    """An `ImageReader` that its process does not survive."""

    def read(self, name: str, place: Place) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError(f"{name} at {place} was read after death")


def die_at(call: str, count: int, after: bool) -> None:
    """Let this process die at a call of the storage or of the system."""
    owner: Any = Storage if call in STORAGE_CALLS else os
    original = getattr(owner, call)
    seen = 0

    def call_or_die(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, call, call_or_die)


def start(session: dict[str, Any]) -> tuple[int, IO[bytes]]:
    """Run a session in a child."""
    errors = tempfile.TemporaryFile()  # noqa: SIM115  read when the child has ended
    child = os.fork()
    if child == 0:
        os.dup2(errors.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if session["die"] is not None:
            die_at(*session["die"])
        os._exit(run(session["arguments"]))
    return child, errors


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    if arguments[0] == "copy":
        shutil.copytree(*arguments[1:])
        return 0
    return main(arguments)


def wait(child: int, errors: IO[bytes]) -> tuple[int, str]:
    """Wait for a child's end."""
    _, status = os.waitpid(child, 0)
    with errors:
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode()


def run_steps(steps: list[list[dict[str, Any]]]) -> list[list[tuple[int, str]]]:
    """Run all steps, one after the other."""
    results = []
    for step in steps:
        children = [start(session) for session in step]
        results.append([wait(*child) for child in children])
    return results


if __name__ == "__main__":
    json.dump(run_steps(json.loads(sys.argv[1])), sys.stdout)
