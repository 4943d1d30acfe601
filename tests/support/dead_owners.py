"""Names of processes that are gone, and of those that nobody here can look for."""

from __future__ import annotations

import subprocess
import sys

from fqgan_dist.storage.owners import name_owner

NAME_OWNER = "from fqgan_dist.storage.owners import name_owner; print(name_owner())"


def name_dead_owner() -> str:
    """Name a process of this host that has ended, by another start of this one."""
    host, process_id, start = name_owner().split("-")
    return f"{host}-{process_id}-{int(start, 16) - 1:x}"


def name_ended_process() -> str:
    """Start a process that names itself, and wait for its end."""
    command = [sys.executable, "-c", NAME_OWNER]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def name_foreign_owner() -> str:
    """Name a process of another host, which has the id of this one."""
    return f"{'0' * 12}-{name_owner().partition('-')[2]}"
