"""What systems and tools leave among data: never a class, an image, a shard or a table."""

from __future__ import annotations

# In small letters. Hidden names, which begin with a dot, need no list.
_NAMES = frozenset(
    {
        "$recycle.bin",
        "#recycle",
        "@eadir",
        "@recycle",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
_SUFFIXES = (".idx",)  # the indices of DALI and wids, beside or among what they index

REASON = "a hidden file or folder, or one of a system or tool"


def is_dropping(name: str) -> bool:
    """Whether a file or folder of this name, without its folders, is no data."""
    small = name.lower()
    return name.startswith(".") or small in _NAMES or small.endswith(_SUFFIXES)


def find_dropping(path: str) -> str | None:
    """Give the part of a relative path up to the first name that is no data; None: all are."""
    parts = path.split("/")
    for count, part in enumerate(parts, 1):
        if part not in (".", "..") and is_dropping(part):
            return "/".join(parts[:count])
    return None
