"""What a user may say about a source beside its name."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fqgan_dist.config import Config
from fqgan_dist.errors import ConfigError
from fqgan_dist.storage.names import is_remote
from fqgan_dist.storage.uri import Location

SourceFormat = Literal["folder", "tar", "zip", "webdataset", "parquet", "manifest"]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)

NO_CLASSES = "none"
"""As `class_key`: the images have no classes."""
THE_ONLY_CLASS = "all"
"""Name of the class of images without classes."""

_EFFECTS: dict[str, tuple[SourceFormat, ...]] = {
    "subfolder": ("folder", "tar", "zip"),
    "root": ("manifest",),
    "image_key": ("webdataset", "parquet", "manifest"),
    "class_key": ("webdataset", "parquet", "manifest"),
    "id_key": ("parquet", "manifest"),
    "keep_keys": ("webdataset", "parquet", "manifest"),
    "is_shared": ("folder", "tar", "zip", "webdataset", "manifest"),
}


class SourceOptions(Config):
    """How a source is read."""

    format: Literal["auto"] | SourceFormat = "auto"
    """What the source is: `folder` (class folders), `tar` (holding class folders, or a tar of each
    class), `zip`, `webdataset` (shards), `parquet`, `manifest` (a CSV, TSV or JSONL list of files);
    `auto` tells by its name and content."""
    subfolder: str = ""
    """Folder inside a folder, tar or zip that holds the class folders; the rest is ignored."""
    root: Location | None = None
    """Folder that the paths of a manifest are relative to; None: the manifest's own."""
    image_key: str | None = None
    """Column of the images (parquet) or of their paths (manifest), or ending of the image's name in
    a WebDataset sample; None: found by its name."""
    class_key: str | None = None
    """Where the class stands: a column (parquet, manifest), or a member of a WebDataset sample
    (`cls`, `txt`, or `json.label` for a field); `none`: the images have no classes; None: found by
    its name."""
    id_key: str | None = None
    """Column of the samples' keys (parquet, manifest); None: `key` of a manifest, if there is."""
    keep_keys: bool = True
    """Whether the images keep the keys that the source gives them; false makes new ones of the
    file's name and the key, for sources that repeat keys."""
    is_shared: bool = False
    """Whether a local source is on a file system that all nodes of a cluster mount at that path.
    What is unpacked first (a compressed tar, parquet) is on one machine in any case."""


def check_effect(uri: str, options: SourceOptions, kind: SourceFormat | None) -> None:
    """Refuse options that change nothing.

    Args:
        uri: the source, for the error.
        options: what was given.
        kind: what the source is; None: a built-in one.

    Raises:
        ConfigError: an option has no effect on a source of this kind.
    """
    for name, value in _given(options).items():
        if kind is None or kind not in _EFFECTS.get(name, FORMATS):
            raise ConfigError(
                f"{name}: {value!r} has no effect on {uri!r} (read as {kind or 'built-in'}); "
                "leave it out, or correct format"
            )
    if options.id_key is not None and not options.keep_keys:
        raise ConfigError(
            f"id_key: {options.id_key!r} has no effect with keep_keys=false; leave one of them out"
        )
    if options.is_shared and is_remote(uri):
        raise ConfigError(
            f"is_shared: has no effect on {uri!r}, which all nodes read; leave it out"
        )


def _given(options: SourceOptions) -> dict[str, Any]:
    # By value: what is passed on explicitly but says nothing new is no mistake.
    fields = type(options).model_fields
    values = {name: getattr(options, name) for name in fields}
    return {name: value for name, value in values.items() if value != fields[name].default}
