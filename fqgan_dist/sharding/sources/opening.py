"""Open a source of images of any kind as one listing.

Sources are hostile input: nothing is unpacked to where a name says, nothing is run, and what is odd
is reported by name. A listing holds names, sizes and places; images are read one by one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fqgan_dist.config import parse_config
from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.class_files import read_class_map, rename_classes
from fqgan_dist.sharding.config import NO_CLASSES, THE_ONLY_CLASS, SourceFormat, SourceOptions
from fqgan_dist.sharding.listing import (
    ListingBuilder,
    NewBuilder,
    SourceListing,
    UnlabelledBuilder,
)
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.sources.file_list import read_image_list
from fqgan_dist.sharding.sources.finding import find_container, find_source
from fqgan_dist.sharding.sources.folder import list_folder
from fqgan_dist.sharding.sources.joining import join_listings
from fqgan_dist.sharding.sources.locations import find_archive, locate_existing_file
from fqgan_dist.sharding.sources.named_images import NamedImagesBuilder, OneFileBuilder
from fqgan_dist.sharding.sources.options import check_effect
from fqgan_dist.sharding.sources.parquet_table import open_parquet
from fqgan_dist.sharding.sources.photograph_crops import list_photographs
from fqgan_dist.sharding.sources.shard_pattern import matches_pattern
from fqgan_dist.sharding.sources.splits import is_split
from fqgan_dist.sharding.sources.tar_archive import open_tar
from fqgan_dist.sharding.sources.webdataset_shards import list_shards
from fqgan_dist.sharding.sources.zip_archive import list_zip
from fqgan_dist.storage.uri import read_location
from fqgan_dist.telemetry.observer import SILENT, Observer


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
    found = find_source(uri, chosen, split)
    check_effect(uri, chosen, found.kind)
    chosen = chosen.model_copy(update={"subfolder": found.subfolder})
    # Read first: listing may take hours.
    class_map = None if chosen.class_map is None else read_class_map(chosen.class_map)
    with ExitStack() as stack:
        opened = (
            stack.enter_context(_open_kind(found.kind, each, chosen, observer, split=split))
            for each in found.uris
        )
        listing = next(opened) if len(found.uris) == 1 else join_listings(list(opened))
        if found.images is not None:
            listing = _select_images(listing, found.images)
        if class_map is not None:
            listing = rename_classes(listing, class_map, str(chosen.class_map))
        others = {*listing.other_splits, *found.other_splits}
        yield replace(listing, other_splits=frozenset(others))


def _select_images(listing: SourceListing, pattern: str) -> SourceListing:
    names = listing.names
    if not listing.has_classes:
        names = [name.removeprefix(f"{THE_ONLY_CLASS}/") for name in names]
    rows = [row for row, name in enumerate(names) if matches_pattern(name, pattern)]
    if not rows:
        raise DataError(
            f"{listing.uri}: files={pattern!r} is the name of none of its {len(listing)} images, "
            f"such as {names[0]!r}; correct it"
        )
    return listing.select(np.array(rows, np.int64))


@contextmanager
def _open_kind(
    kind: SourceFormat, uri: str, options: SourceOptions, observer: Observer, *, split: str
) -> Iterator[SourceListing]:
    match kind:
        case "parquet":
            with open_parquet(uri, options, observer, split=split) as listing:
                yield listing
        case "webdataset":
            yield list_shards(uri, options, observer, split=split)
        case "manifest":
            with _open_named_images(uri, options, observer, split=split) as listing:
                yield listing
        case _:
            builder = UnlabelledBuilder if options.class_key == NO_CLASSES else ListingBuilder
            with _open_images(kind, uri, options, observer, builder) as listing:
                if options.format == "auto":
                    _check_no_splits(listing)
                yield listing


def _check_no_splits(listing: SourceListing) -> None:
    """Refuse folders that are called as splits are, but hold images and no classes."""
    names = listing.class_names()
    if len(names) > 1 and all(map(is_split, names)):
        raise ConfigError(
            f"{listing.uri}: its folders are called as splits are ({', '.join(names)}), but hold "
            "images and no classes; name the list of their classes as the source, or give "
            "class_key=none and files=train/* or the like; if they are classes, say so with "
            f"format={listing.kind}"
        )


@contextmanager
def _open_images(
    kind: SourceFormat,
    uri: str,
    options: SourceOptions,
    observer: Observer,
    new_builder: NewBuilder,
) -> Iterator[SourceListing]:
    """List a folder or archive of images."""
    match kind:
        case "tar":
            with open_tar(uri, options, observer, new_builder) as listing:
                yield listing
        case "zip":
            yield list_zip(uri, options, observer, new_builder)
        case _:
            yield list_folder(uri, options, observer, new_builder)


@contextmanager
def _open_named_images(
    uri: str, options: SourceOptions, observer: Observer, *, split: str
) -> Iterator[SourceListing]:
    """List the images that a list names, which may be a file of the archive that holds them."""
    archive = find_archive(uri)
    with ExitStack() as stack:
        if archive is None:
            storage, name, _ = locate_existing_file(uri)
            file = stack.enter_context(storage.open_read(name))
            root, subfolder = storage.root, options.subfolder
        else:
            file = io.BytesIO(_read_member(archive, uri, observer))
            # The list's own folder in the archive, as beside any other list.
            root = archive
            inner = uri[len(archive) + 1 :].rpartition("/")[0]
            subfolder = "/".join(part for part in (inner, options.subfolder) if part)
        if options.root is not None:
            root, subfolder = options.root.rstrip("/"), options.subfolder
        kind = find_container(root)
        with observer.track(None, "reading rows", "rows") as bar:
            images = read_image_list(file, uri, options, bar, split=split)
        where = options.model_copy(update={"subfolder": subfolder})
        opened = _open_images(kind, root, where, observer, partial(NamedImagesBuilder, images))
        listing = stack.enter_context(opened)
        yield replace(listing, uri=uri, other_splits=frozenset(images.other_splits))


def _read_member(archive: str, uri: str, observer: Observer) -> bytes:
    name = uri[len(archive) + 1 :]
    kind, builder = find_container(archive), partial(OneFileBuilder, name)
    with _open_images(kind, archive, SourceOptions(), observer, builder) as listing:
        return listing.read(0)
