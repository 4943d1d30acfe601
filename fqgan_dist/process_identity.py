"""Which process a number is: within a host, the number and the moment of its start tell one.

A number alone is given again. A host is a boot of a machine and a space of process numbers in it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import uuid
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def name_host() -> str:
    """Name this boot of this host and this space of process numbers, in 12 hexadecimal digits.

    Where the kernel does not say, every process is its own host.
    """
    return _name_host(os.getpid())


@functools.lru_cache(maxsize=1)
def _name_host(process_id: int) -> str:  # noqa: ARG001  by its number: a forked process is another
    try:
        boot = _BOOT_ID.read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, namespace = uuid.uuid4().hex, ""
    # The host's name too: clones of one virtual machine in memory have one boot id.
    text = f"{boot} {namespace} {platform.node()}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_start(process_id: int) -> int | None:
    """Read when a process started, in clock ticks since the boot; None: it cannot be read."""
    fields = _read_fields(process_id)
    return None if fields is None else int(fields[19])


def read_state(process_id: int) -> str | None:
    """Read the kernel's letter for what a process does (T: stopped); None: it cannot be read."""
    fields = _read_fields(process_id)
    return None if fields is None else fields[0]


def _read_fields(process_id: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{process_id}/stat").read_text(errors="replace")
    except OSError:
        return None
    # From the third on: the second, its name in brackets, may hold anything.
    fields = text.rpartition(")")[2].split()
    return fields if len(fields) >= 20 and fields[19].isdecimal() else None
