"""What an error of a local disk means, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fqgan_dist.errors import DataError

_SHOWN_CHARACTERS = 1000
_ADVICE = {
    errno.ENOSPC: "the disk is full: free space on it, or name a folder elsewhere",
    errno.EDQUOT: "the user's quota is used up: free space, raise it, or name a folder elsewhere",
    errno.EROFS: "the file system is read-only: mount it for writing, or name a folder elsewhere",
    errno.EACCES: "check the permissions of the file and its folders",
    errno.EPERM: "check the permissions of the file and its folders",
    errno.ENAMETOOLONG: "a name may have 255 bytes and a path 4096: shorten it",
    errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
    errno.ENFILE: "the machine has too many open files: raise fs.file-max, or run less on it",
    errno.EFBIG: "the file system or `ulimit -f` allows no file of that size",
    errno.EISDIR: "a folder is where a file should be: remove it, or name another place",
    errno.ENOTDIR: "a file is where a folder should be: remove it, or name another place",
}


def explain_disk_error(where: str | Path, error: OSError) -> DataError:
    """Make the error that the user gets; `where` is the file or folder that was asked for."""
    where, reason = _shorten(str(where)), _shorten(str(error))
    advice = _ADVICE.get(error.errno or 0, "check the disk or the file system")
    if error.errno in (errno.EACCES, errno.EPERM):
        return DataError(f"{where}: access is refused ({reason}); {advice}")
    return DataError(f"{where}: cannot be read or written ({reason}); {advice}")


def _shorten(text: str) -> str:
    # A path may be too long for a message too.
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def is_disk_error(error: OSError) -> bool:
    """Whether somebody can do something about it: a full disk, a refusal, a limit."""
    return error.errno in _ADVICE


@contextmanager
def clear_disk_errors(where: str | Path) -> Iterator[None]:
    """Turn what the operating system raises in a block into errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise explain_disk_error(where, error) from error
