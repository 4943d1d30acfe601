"""The folder of a Ray that is started here: closed to other users, with room for its sockets."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.leftovers import Swept, is_abandoned
from fqgan_dist.storage.owners import OWNER_PATTERN, name_owner
from fqgan_dist.storage.scratch import age_s, lock_folder, measure_folder
from fqgan_dist.storage.sweeping import sweep_leftovers

FOLDER_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""Where the folder is made, as Ray has it; `/tmp` being the default."""

# Of a Unix socket's address, less the null byte.
_MAX_PATH_BYTES = 107
_PREFIX = "ray-"
# Ray opens the folder that it is given to everybody (0777), so it gets one inside.
_INNER = "r"
# A file that says whose the folder is: in its name is no room for that.
_OWNER = "owner"
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")
_KEPT = "kept"
_KEPT_S = 7 * 24 * 3600.0
"""How long logs of Ray are kept after an error, and folders of processes that cannot be seen."""

logger = logging.getLogger(__name__)


@contextmanager
def private_folder() -> Iterator[str]:
    """Make a folder for Ray's sessions that only this user enters (0700).

    Logs, sockets and what is spilled lie in it: whoever may write to the sockets runs code as this
    user. It is removed at the end of the block, and kept, with the logs, where that ends in an
    error: for a week. What killed drivers of this host have left is removed first.

    Raises:
        ConfigError: there is no room for it; see `check_socket_paths`.
    """
    check_socket_paths()
    base = next(filter(None, map(os.environ.get, FOLDER_VARIABLES)), "/tmp")
    sweep_leftovers(lambda: _sweep(Path(base)))
    try:
        outer = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
        owner = Path(outer, _OWNER)
        owner.write_text(name_owner())
        unlock = lock_folder(outer)
    except OSError as error:
        raise ConfigError(
            f"{base}: no folder for Ray can be made there ({error.strerror}); set RAY_TMPDIR to a "
            "folder that this user may write to"
        ) from error
    try:
        yield os.path.join(outer, _INNER)
    except Exception:
        logger.info("the logs of Ray are kept in %s for a week", outer)
        with suppress(OSError):
            owner.write_text(_KEPT)
        raise
    else:
        # What the last processes of Ray still write is lost, as all of it is.
        shutil.rmtree(outer, ignore_errors=True)
    finally:
        unlock()


def _sweep(base: Path) -> Swept:
    """Remove the folders of drivers that were killed; Ray's processes ended with them."""
    swept = Swept()
    for name in os.listdir(base):
        folder = base / name
        if _NAME.fullmatch(name) is None:
            continue
        with suppress(OSError):  # of another user, or just removed
            info = folder.lstat()
            owner = (folder / _OWNER).read_text(errors="replace")
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                continue
            if re.fullmatch(f"{OWNER_PATTERN}|{_KEPT}", owner) is None:
                continue
            if is_abandoned(
                None if owner == _KEPT else owner,
                lambda folder=folder: age_s(folder),
                foreign_s=_KEPT_S,
            ):
                size = measure_folder(folder)
                shutil.rmtree(folder)
                swept += Swept(1, size)
    return swept


def max_folder_bytes() -> int:
    """Give the greatest length of the folder's path for a Ray that this process starts."""
    folder = f"/{_PREFIX}{'x' * 8}/{_INNER}"  # tempfile's names have eight random characters
    # As Ray names the longest socket, of a session that is named by its time and this process.
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return _MAX_PATH_BYTES - len(f"{folder}/{session}/sockets/plasma_store")


def check_socket_paths() -> None:
    """Check that Ray's sockets have room in its folder, before Ray is started.

    Raises:
        ConfigError: the folder's path is too long, or not absolute.
    """
    for name in FOLDER_VARIABLES:
        folder = os.environ.get(name)
        if not folder:
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
