"""Where a source lies, as a storage and a name in it."""

from __future__ import annotations

import os
import re

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.sources.shard_pattern import is_pattern, match_pattern
from fqgan_dist.storage.storage import Storage, locate_file

_SHOWN_NAMES = 3
_THROUGH_ARCHIVE = r"\.(zip|tar|tgz|tar\.[a-z0-9]+)/"


def source_exists(uri: str) -> bool:
    """Whether a file, a folder, or one file of a pattern is there."""
    return any(map(_source_exists, expand_folders(uri)))


def _source_exists(uri: str) -> bool:
    storage, name = locate_file(uri.rstrip("/"))
    if is_pattern(uri):
        return bool(match_pattern(name, storage.list())[0])
    return storage.exists(name) or folder_exists(uri) or find_archive(uri) is not None


def expand_folders(uri: str) -> list[str]:
    """Give the URIs that a URI with patterns in its folders stands for: `{a,b}/x-*.tar`.

    Raises:
        DataError: there are no such folders.
    """
    head, slash, last = uri.rstrip("/").rpartition("/")
    folders = head.split("/")
    first = next((at for at, name in enumerate(folders) if is_pattern(name)), None)
    if first is None or folder_exists(head):
        return [uri]
    start = "/".join(folders[:first])
    names, _ = match_pattern(folders[first], Storage(start or slash).list() if first else ())
    rest = "/".join([*folders[first + 1 :], last])
    found = [f"{start}/{name}/{rest}" for name in names]
    if not found:
        raise DataError(f"{uri}: no folder is called {folders[first]!r} there; correct the pattern")
    return [each for name in found for each in expand_folders(name)]


def find_archive(uri: str) -> str | None:
    """Give the archive that a URI goes through, `x.zip/val/labels.txt`; None: there is none."""
    ends = [match.end() - 1 for match in re.finditer(_THROUGH_ARCHIVE, uri)]
    archives = (uri[:end] for end in ends)
    return next((archive for archive in archives if _is_file(archive)), None)


def _is_file(uri: str) -> bool:
    storage, name = locate_file(uri)
    return storage.exists(name)


def folder_exists(uri: str) -> bool:
    """Whether a folder is there; one in a bucket has something in it."""
    storage = Storage(uri)
    return os.path.isdir(storage.root) if storage.is_local else bool(storage.list())


def locate_existing_file(uri: str) -> tuple[Storage, str, int]:
    """Give the storage of a file's folder, the file's name there, and its size in bytes.

    Raises:
        DataError: there is no such file.
    """
    storage, name = locate_file(uri)
    try:
        return storage, name, storage.size(name)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; correct the path of the source") from error


def locate_files(uri: str) -> tuple[Storage, list[str]]:
    """Give the storage of the folder, and the files in it that a name or a pattern stands for.

    Raises:
        DataError: some are missing.
    """
    storage, pattern = locate_file(uri)
    files, missing = match_pattern(pattern, storage.list())
    if not files:
        more = f", nor one as the {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(f"{uri}: no such file: none is called {missing[0]!r}{more}; correct it")
    if missing:
        raise DataError(
            f"{uri}: {len(missing)} of {len(missing) + len(files)} files are missing: "
            f"{missing[:_SHOWN_NAMES]!r}; correct the pattern, or copy them again"
        )
    return storage, files
