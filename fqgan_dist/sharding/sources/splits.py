"""Which split the files of a source belong to, where their names say so."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from fqgan_dist.data.index import INDEX_NAME
from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.sources.locations import folder_exists
from fqgan_dist.storage.storage import Storage

HELD_OUT_WORDS = ("val", "valid", "validation", "test")
"""What folders and files of held-out images are called."""

_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(_NAMES)})(?=$|[-_.\d])", re.IGNORECASE)
_SHOWN_NAMES = 3

logger = logging.getLogger(__name__)


def name_split(text: str) -> str:
    """Give a split its usual name, `train`, `val` or `test`; another name stays as it is."""
    return _NAMES.get(text.lower(), text)


def is_split(text: str) -> bool:
    """Whether a folder of this name holds a split."""
    return text.lower() in _NAMES


def split_of(file: str) -> str | None:
    """Give the split that a file's name tells, as in `train-00000-of-00294.parquet`."""
    found = _SPLIT.search(file)
    return name_split(found[1]) if found else None


def choose_files(uri: str, files: Sequence[str], split: str) -> list[str]:
    """Keep the files of a split, where there are files of several.

    Args:
        uri: the folder, for messages.
        files: names of the files in it.
        split: the split that is asked for.

    Raises:
        ConfigError: none is of this split, or some do not say what they are of.
    """
    found: dict[str | None, list[str]] = {}
    for file in files:
        found.setdefault(split_of(file), []).append(file)
    if len(found) <= 1:
        return list(files)
    chosen = found.get(name_split(split))
    if chosen is None or None in found:
        shown = "; ".join(
            f"{name or 'no split'}: {len(names)} ({', '.join(names[:_SHOWN_NAMES])} ...)"
            for name, names in sorted(found.items(), key=lambda item: str(item[0]))
        )
        raise ConfigError(
            f"{uri}: holds files of several splits ({shown}), asked for is {split!r}; name the "
            "files with a pattern such as train-*.parquet or train-{0000..0146}.tar"
        )
    others = ", ".join(sorted(str(name) for name in found if name != name_split(split)))
    logger.info("%s: %d files of %s are read; those of %s are not", uri, len(chosen), split, others)
    return chosen


def find_held_out_split(uri: str) -> str | None:
    """Say which files of a folder of shards or tables are held out beside those for training.

    Returns:
        `val`, or `test` where there is no `val`; None where all are of one split, and where an
        index says that all belong together.
    """
    files = Storage(uri).list() if folder_exists(uri) else []
    if INDEX_NAME in files:
        return None
    splits = {split_of(file) for file in files if file.endswith((".tar", ".parquet"))}
    return next((name for name in ("val", "test") if {"train", name} <= splits), None)
