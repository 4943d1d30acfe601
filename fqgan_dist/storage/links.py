"""What is read below a folder that a user names: regular files, and links that stay within it.

Names in sources, datasets and run directories are hostile input, and so are the links that lie
there. A link is followed where its target lies below the folder that the user named; any other one
is refused by name, and so is what is no regular file: a device never ends, a pipe never answers. A
file that the user names, such as weights in a cache of links, may be a link to anywhere. Buckets
have no links.
"""

from __future__ import annotations

import os
import stat

from fqgan_dist.errors import DataError

LEADS_OUT = "a link that leads out of the folder that was named"
"""What is wrong with a link that is not followed."""


class RefusedObjectError(DataError):
    """What has this name is not read: a link out of the root, no regular file, or too long.

    The store is not at fault, so whoever looks at many objects can name this one and go on.
    """


def find_fault_of_link(path: str, root: str) -> str | None:
    """Say why a file or folder below a root, perhaps a link, must not be read; None if it may be.

    Args:
        path: absolute; need not exist.
        root: the folder that the user named, absolute; may be a link itself.
    """
    if not _is_within(os.path.realpath(path), os.path.realpath(root)):
        return LEADS_OUT
    try:
        mode = os.stat(path).st_mode
    except OSError:  # ELOOP is an error of its own
        return "not a file: a broken link, or a circle of links"
    is_plain = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return None if is_plain else "not a file: a device, pipe or socket"


def check_link(path: str, root: str) -> None:
    """Refuse a path that leads out of its root.

    Raises:
        RefusedObjectError: it does.
    """
    if not _is_within(os.path.realpath(path), os.path.realpath(root)):
        raise RefusedObjectError(
            f"{path}: {LEADS_OUT}, {root}; name a folder that holds both, or copy what the link "
            "leads to in its place (`cp -rL`)"
        )


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
