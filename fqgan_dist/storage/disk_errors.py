"""What an error of a local disk means, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fqgan_dist.errors import DataError, FqganError, StorageOutageError

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
_OF_NETWORK = "the server of this file system is out of reach: start it, or mend the network"
_ADVICE |= dict.fromkeys(
    (
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.ECONNRESET,
    ),
    _OF_NETWORK,
)
_ROOM = {errno.ENOSPC, errno.EDQUOT}
_PASSING = _ROOM | {number for number, advice in _ADVICE.items() if advice == _OF_NETWORK}


def explain_disk_error(where: str | Path, error: OSError) -> DataError:
    """Make the error that the user gets; `where` is the file or folder that was asked for."""
    where, reason = _shorten(str(where)), _shorten(str(error))
    advice = _ADVICE.get(error.errno or 0, "check the disk or the file system")
    if error.errno in (errno.EACCES, errno.EPERM):
        return DataError(f"{where}: access is refused ({reason}); {advice}")
    kind = StorageOutageError if is_passing_disk_error(error) else DataError
    return kind(f"{where}: cannot be read or written ({reason}); {advice}")


def is_passing_disk_error(error: OSError) -> bool:
    """Whether the same may succeed later: there is no room, or a network's disk is out of reach."""
    return error.errno in _PASSING


def _shorten(text: str) -> str:
    # A path may be too long for a message too.
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def is_disk_error(error: OSError) -> bool:
    """Whether somebody can do something about it: a full disk, a refusal, a limit."""
    return error.errno in _ADVICE


def explain_if_of_disk(error: Exception) -> Exception:
    """Give a raw error of a local file as one that says what to do; any other as it is.

    For where processes end: files are written by packages of others too. Sockets raise some of the
    same numbers, but name no file.
    """
    if not isinstance(error, OSError) or isinstance(error, FqganError):
        return error
    is_of_disk = error.errno in _ROOM or (error.filename is not None and is_disk_error(error))
    if not is_of_disk:
        return error
    explained = explain_disk_error(error.filename or "a file of this machine", error)
    explained.__cause__ = error
    return explained


@contextmanager
def clear_disk_errors(where: str | Path) -> Iterator[None]:
    """Turn what the operating system raises in a block into errors that say what to do."""
    try:
        yield
    except OSError as error:
        raise explain_disk_error(where, error) from error
