"""Room for the sockets of a Ray that is started here: their paths have a greatest length."""

from __future__ import annotations

import os

from fqgan_dist.errors import ConfigError

FOLDER_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""Where Ray looks for the folder of its sessions, `/tmp` being the default."""

# Of a Unix socket's address, less the null byte.
_MAX_PATH_BYTES = 107


def max_folder_bytes() -> int:
    """Give the greatest length of the folder's path for a Ray that this process starts."""
    # As Ray names the longest socket, of a session that is named by its time and this process.
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return _MAX_PATH_BYTES - len(f"/ray/{session}/sockets/plasma_store")


def check_socket_paths() -> None:
    """Check that Ray's sockets have room in its folder, before Ray is started.

    Raises:
        ConfigError: the folder's path is too long, or not absolute.
    """
    for name in FOLDER_VARIABLES:
        folder = os.environ.get(name)
        if folder is None:
            continue
        size = len(os.fsencode(folder.rstrip("/")))
        if size > max_folder_bytes():
            raise ConfigError(
                f"{name}: {folder!r} has {size} bytes; expected {max_folder_bytes()} at most, as "
                f"Ray's sockets lie below it and their paths may have {_MAX_PATH_BYTES}; set "
                "RAY_TMPDIR to a shorter one, such as /tmp"
            )
        if not folder.startswith("/"):
            raise ConfigError(f"{name}: {folder!r} is no absolute path, as Ray needs one")
        return
