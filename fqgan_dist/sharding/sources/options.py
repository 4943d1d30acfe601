"""Which options of a source have an effect on which kind of source."""

from __future__ import annotations

import re
from typing import Any

from fqgan_dist.errors import ConfigError
from fqgan_dist.sharding.config import FORMATS, NO_CLASSES, SourceFormat, SourceOptions
from fqgan_dist.storage.names import is_remote

_EFFECTS: dict[str, tuple[SourceFormat, ...]] = {
    "subfolder": ("folder", "tar", "zip", "manifest"),
    "root": ("manifest",),
    "image_key": ("webdataset", "parquet", "manifest"),
    "id_key": ("parquet", "manifest"),
    "split_key": ("parquet", "manifest"),
    "keep_keys": ("webdataset", "parquet", "manifest"),
    "is_shared": ("folder", "tar", "zip", "webdataset", "manifest"),
}
_KINDS_WITH_CLASS_FOLDERS = ("folder", "tar", "zip")


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
            remedy = "leave it out" if kind is None else "leave it out, or correct format="
            raise ConfigError(
                f"{name}: {value!r} has no effect on {uri!r} (read as {kind or 'built-in'}); "
                f"{remedy}"
            )
    if kind in _KINDS_WITH_CLASS_FOLDERS and options.class_key not in (None, NO_CLASSES):
        raise ConfigError(
            f"class_key: {options.class_key!r} has no effect on {uri!r} (read as {kind}), where "
            f"the class is the folder; leave it out, give class_key={NO_CLASSES}, or "
            "correct format="
        )
    if options.id_key is not None and not options.keep_keys:
        raise ConfigError(
            f"id_key: {options.id_key!r} has no effect with keep_keys=false; leave one of them out"
        )
    if options.class_map is not None and options.class_key == NO_CLASSES:
        raise ConfigError(
            f"class_map: {options.class_map!r} has no effect with class_key={NO_CLASSES}; leave "
            "one of them out"
        )
    if options.is_shared and is_remote(uri):
        raise ConfigError(
            f"is_shared: has no effect on {uri!r}, which all nodes read; leave it out"
        )


def name_options(message: str, prefix: str) -> str:
    """Give the options of sources that an error names, `subfolder=`, their names elsewhere."""
    names = "|".join(SourceOptions.model_fields)
    return re.sub(rf"(?<![\w.])({names})(?==)|^({names})(?=:)", rf"{prefix}\g<0>", message)


def _given(options: SourceOptions) -> dict[str, Any]:
    # By value: what is passed on explicitly but says nothing new is no mistake.
    fields = type(options).model_fields
    values = {name: getattr(options, name) for name in fields}
    return {name: value for name, value in values.items() if value != fields[name].default}
