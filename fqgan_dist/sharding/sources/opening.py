"""Open a source of images of any kind as one listing.

Sources are hostile input: nothing is unpacked to where a name says, nothing is run, and what is odd
is reported by name. A listing holds names, sizes and places; images are read one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fqgan_dist.config import parse_config
from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.data.index import INDEX_NAME
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.listing import SourceListing, find_danger
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.sources.file_list import LIST_SUFFIXES, list_named_files
from fqgan_dist.sharding.sources.folder import list_folder
from fqgan_dist.sharding.sources.locations import (
    folder_exists,
    source_exists,
)
from fqgan_dist.sharding.sources.options import (
    FORMATS,
    SourceFormat,
    SourceOptions,
    check_effect,
)
from fqgan_dist.sharding.sources.parquet_table import PARQUET_SUFFIX, open_parquet
from fqgan_dist.sharding.sources.photograph_crops import list_photographs
from fqgan_dist.sharding.sources.shard_pattern import is_pattern
from fqgan_dist.sharding.sources.tar_archive import (
    COMPRESSED_SUFFIXES,
    PLAIN_SUFFIX,
    first_members,
    open_tar,
)
from fqgan_dist.sharding.sources.webdataset_shards import SHARD_SUFFIX, list_shards
from fqgan_dist.sharding.sources.zip_archive import ZIP_SUFFIX, list_zip
from fqgan_dist.storage.storage import Storage, locate_file
from fqgan_dist.storage.uri import read_location
from fqgan_dist.telemetry.observer import SILENT, Observer

_EXAMINED_MEMBERS = 32
_EXAMINED_NAMES = 20
_SHOWN_NAMES = 3

_LISTERS: dict[SourceFormat, Callable[[str, SourceOptions, Observer], SourceListing]] = {
    "folder": list_folder,
    "zip": list_zip,
    "manifest": list_named_files,
}


@contextmanager
def open_source(
    uri: str,
    *,
    split: str = "train",
    photographs: PhotographsConfig | None = None,
    observer: Observer = SILENT,
    **options: Any,
) -> Iterator[SourceListing]:
    """List the images of a source, and keep what was unpacked of it for reading.

    Args:
        uri: a path, an s3:// URI, or `builtin:photographs`.
        split: part of the photographs, `train` or `val`, or of a folder that has files of several.
        photographs: how the photographs are cropped; None for other sources.
        observer: is told how far listing and unpacking are.
        options: fields of `SourceOptions`.

    Raises:
        ConfigError: it cannot be told what the source is, or an option is wrong or has no effect.
        DataError: the source is missing or damaged, or holds no image.
    """
    chosen = parse_config(options, SourceOptions, source="source options")
    if uri == BUILTIN_PHOTOGRAPHS:
        check_effect(uri, chosen, None)
        yield list_photographs(split, photographs or PhotographsConfig())
        return
    if photographs is not None:
        raise ConfigError(f"image_size and crops_per_photograph have no effect on {uri!r}")
    uri = read_location(uri, what="source")
    kind = find_format(uri, chosen) if chosen.format == "auto" else chosen.format
    check_effect(uri, chosen, kind)
    if kind == "tar":
        with open_tar(uri, chosen, observer) as listing:
            yield listing
    elif kind == "parquet":
        with open_parquet(uri, chosen, observer, split=split) as listing:
            yield listing
    elif kind == "webdataset":
        yield list_shards(uri, chosen, observer, split=split)
    else:
        yield _LISTERS[kind](uri, chosen, observer)


def find_format(uri: str, options: SourceOptions) -> SourceFormat:
    """Tell what a source is, by its name and by what is in it.

    Args:
        uri: the source.
        options: what was said of it: a subfolder is a folder of class folders.

    Raises:
        ConfigError: it cannot be told.
        DataError: there is no such source.
    """
    if uri.endswith(COMPRESSED_SUFFIXES):
        return "tar"
    if uri.endswith(ZIP_SUFFIX):
        return "zip"
    if uri.endswith(LIST_SUFFIXES):
        return "manifest"
    if uri.endswith(PLAIN_SUFFIX):
        return "webdataset" if _is_of_samples(uri, options) else "tar"
    if uri.endswith(PARQUET_SUFFIX):
        return "parquet"
    return "folder" if options.subfolder else _find_format_of_folder(uri)


def _is_of_samples(uri: str, options: SourceOptions) -> bool:
    """Whether a tar, or several, are shards; else it holds class folders."""
    if options.class_key is not None:
        return True
    storage, name = locate_file(uri)
    if is_pattern(uri) and not storage.exists(name):
        return True  # else a file of that very name, `x[1].tar`
    if options.subfolder:
        return False
    return any(name.lower().endswith(".cls") for name in first_members(uri, _EXAMINED_MEMBERS))


def _find_format_of_folder(uri: str) -> SourceFormat:
    storage = Storage(uri)
    names = [name for name in storage.list() if not is_dropping(name)]
    if not names and not folder_exists(uri):
        if source_exists(uri):
            raise ConfigError(f"{uri}: a file of no known ending; say what it is with format=...")
        raise DataError(
            f"{uri}: no such folder; expected class folders with images, or a "
            f"{'/'.join(FORMATS)} source, or {BUILTIN_PHOTOGRAPHS}"
        )
    shards = [name for name in names if name.endswith(SHARD_SUFFIX)]
    tables = [name for name in names if name.endswith(PARQUET_SUFFIX)]
    folders = _find_folders(storage, names)
    if shards and (INDEX_NAME in names or not folders):
        return "webdataset"
    if tables and not folders and not shards:
        return "parquet"
    if shards or tables:
        raise ConfigError(
            f"{uri}: holds folders ({', '.join(folders[:_SHOWN_NAMES])}) and files like "
            f"{(shards or tables)[0]!r}; say which to read with format=folder, "
            f"format={'webdataset' if shards else 'parquet'}"
        )
    return "folder"


def _find_folders(storage: Storage, names: list[str]) -> list[str]:
    # Those without an ending first: usually classes. Some are enough, as each costs a request.
    # Names that the storage would refuse are left to the listing, which reports them.
    safe = (name for name in names if find_danger(name) is None)
    likely = sorted(safe, key=lambda name: ("." in name, name))[:_EXAMINED_NAMES]
    return [name for name in likely if not storage.exists(name)]
