"""What a user may say about a source of images beside its name."""

from __future__ import annotations

from typing import Literal, get_args

from fqgan_dist.config import Config
from fqgan_dist.storage.uri import Location

SourceFormat = Literal["folder", "tar", "zip", "webdataset", "parquet", "manifest"]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)

ALL_ROWS = "none"
"""`split_key` where rows of all splits are meant."""
NO_CLASSES = "none"
"""As `class_key`: the images have no classes."""
THE_ONLY_CLASS = "all"
"""Name of the class of images without classes."""


class SourceOptions(Config):
    """How a source is read."""

    format: Literal["auto", SourceFormat] = "auto"
    """What the source is: `folder` (class folders), `tar` (holding class folders, or a tar of each
    class), `zip`, `webdataset` (shards), `parquet`, `manifest` (a list of images and their classes:
    CSV, TSV, JSONL, or text with a line per image); `auto` tells by its name and content."""
    files: str | None = None
    """Which files of the source are read: names with `*`, `?`, `[...]`, `{a,b}` or `{000..146}`. Of
    a folder of archives, shards, tables or lists these are its files, else the images, by
    `class/name`; None: all of the split."""
    subfolder: str = ""
    """Folder inside a folder, tar or zip that holds the class folders, or the images of a manifest;
    the rest is ignored."""
    root: Location | None = None
    """Folder, tar or zip that holds the images which a manifest names; None: the manifest's own
    folder."""
    image_key: str | None = None
    """Column of the images (parquet) or of their paths (manifest), or ending of the image's name in
    a WebDataset sample; None: found by its name."""
    class_key: str | None = None
    """Where the class stands: a column (parquet, manifest), or a member of a WebDataset sample
    (`cls`, `txt`, or `json.label` for a field); `none`: the images have no classes, and may lie in
    folders of any depth; None: found by its name, in folders and archives the folder's."""
    class_map: Location | None = None
    """File that says which class each label of the source stands for: a line `LABEL CLASS` each, or
    only the classes, of the labels 0, 1, ...; None: the labels are the classes' names."""
    id_key: str | None = None
    """Column of the samples' keys (parquet, manifest); None: `key` of a manifest, if there is."""
    split_key: str | None = None
    """Column that says which split a row is of (parquet, manifest), of which those of the split
    asked for are read; `none`: all rows are meant; None: found by its name and values, in manifests
    also in folders of the paths that are called as splits are."""
    keep_keys: bool = True
    """Whether the images keep the keys that the source gives them; false makes new ones of the
    file's name and the key, for sources that repeat keys."""
    is_shared: bool = False
    """Whether a local source is on a file system that all nodes of a cluster mount at that path.
    What is unpacked first (a compressed tar, parquet) is on one machine in any case."""
