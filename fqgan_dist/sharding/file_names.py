"""What a file is by the ending of its name."""

from __future__ import annotations

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Endings of image names, in small letters."""
TAR_SUFFIX = ".tar"
"""Of plain tars, among them WebDataset's shards."""
COMPRESSED_SUFFIXES = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
)
"""Of compressed tars."""
ZIP_SUFFIX = ".zip"
PARQUET_SUFFIX = ".parquet"
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
"""Of lists of images and their classes."""
ARCHIVE_SUFFIXES = (TAR_SUFFIX, *COMPRESSED_SUFFIXES, ZIP_SUFFIX, PARQUET_SUFFIX)
"""Of files that hold images."""


def is_image_name(name: str) -> bool:
    """Whether a name ends as those of images do."""
    return name.lower().endswith(IMAGE_SUFFIXES)
