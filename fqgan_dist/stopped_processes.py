"""Ending a process that cannot end itself, as it was stopped or holds the interpreter's lock.

The C part of `faulthandler` writes the stacks of all threads where SIGUSR2 comes, and then the
signal ends the process. A stopped process takes it as soon as it is continued, before it runs
anything else.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fqgan_dist.process_identity import name_host, read_start, read_state

_SIGNAL = signal.SIGUSR2
_END_S = 5.0
_POLL_S = 0.02
_MAX_STACKS_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process, so that it can be ended by somebody who never ends another one."""

    host: str
    """Names its machine and its space of process numbers."""
    pid: int
    started: int
    """When it was started, in the kernel's ticks."""
    stacks_fd: int
    """Number of its open file that SIGUSR2 writes its stacks to."""
    node: str = ""
    """Ray's id of its node; "" without Ray."""


@contextmanager
def endable_process(node: str = "") -> Iterator[ProcessId]:
    """Let others end this process by `end_process` during a block; `node` is Ray's id of its node.

    The stacks go to memory that has no name, so that nothing is left behind.
    """
    stacks_fd = os.memfd_create("fqgan-stacks")
    faulthandler.register(_SIGNAL, file=stacks_fd, all_threads=True, chain=True)
    try:
        yield ProcessId(
            host=name_host(),
            pid=os.getpid(),
            started=read_start(os.getpid()) or 0,
            stacks_fd=stacks_fd,
            node=node,
        )
    finally:
        faulthandler.unregister(_SIGNAL)
        os.close(stacks_fd)


def is_here(process: ProcessId) -> bool:
    """Whether a process runs on this machine, where it can be ended from here."""
    return process.host == name_host()


def end_process(process: ProcessId) -> str | None:
    """End a process of this machine and give the stacks of its threads; None: it is gone already.

    Nobody else is ended, should its number be another's by now.
    """
    if not is_here(process) or read_start(process.pid) != process.started:
        return None
    try:
        with Path(f"/proc/{process.pid}/fd/{process.stacks_fd}").open("rb") as stacks:
            os.kill(process.pid, _SIGNAL)
            os.kill(process.pid, signal.SIGCONT)
            if not _is_gone_within(process, _END_S):
                os.kill(process.pid, signal.SIGKILL)
                _is_gone_within(process, _END_S)
            return stacks.read(_MAX_STACKS_BYTES).decode(errors="replace")
    except ProcessLookupError:
        return ""
    except OSError as error:
        with suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)
        return f"its stacks cannot be read ({error})"


def describe_stacks() -> str:
    """Write the stacks of all threads of this process, the newest call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )


def _is_gone_within(process: ProcessId, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        # A zombie is gone, but for its parent.
        if read_start(process.pid) != process.started or read_state(process.pid) in ("Z", "X"):
            return True
        time.sleep(_POLL_S)
    return False
