"""Run other programs with a time limit, for what may crash or hang a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Finished:
    """A program that has ended, or was ended."""

    exit_code: int | None
    """None: it was ended at the time limit."""
    output: str
    errors: str

    @property
    def has_succeeded(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.exit_code == 0

    @property
    def reason(self) -> str:
        """Why it failed: the last line of its errors, or how it ended."""
        if self.exit_code is None:
            return "no answer in time"
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        text = lines[-1] if lines else f"exit code {self.exit_code} without a message"
        return text[:_SHOWN_CHARACTERS]


def run_programs(
    commands: Sequence[Sequence[str]],
    *,
    time_limit_s: float,
    environments: Sequence[Mapping[str, str]] | None = None,
) -> list[Finished]:
    """Run programs at once and wait for all; after `time_limit_s` those left are killed.

    `environments` are variables to add, for each.

    Raises:
        FileNotFoundError: a program is not installed.
    """
    added = environments or [{} for _ in commands]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_start(command, {**os.environ, **variables}))
            for command, variables in zip(commands, added, strict=True)
        ]
        return _wait(processes, time_limit_s)


def python_module(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def import_path() -> dict[str, str]:
    """Give the variable that lets another interpreter import what this one can.

    On a node the package may come from a job's working folder, which only `sys.path` knows.
    """
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@contextlib.contextmanager
def _start(
    command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that its own children can be ended with it
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _wait(processes: Sequence[subprocess.Popen[str]], time_limit_s: float) -> list[Finished]:
    deadline = time.monotonic() + time_limit_s

    def finish(process: subprocess.Popen[str]) -> Finished:
        try:
            output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            return Finished(None, output, errors)
        return Finished(process.returncode, output, errors)

    # All pipes are read at once: a rank that waits for a full pipe would hold up the others.
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(finish, processes))
