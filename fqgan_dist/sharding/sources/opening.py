"""Open a source of images of any kind as one listing.

Sources are hostile input: nothing is unpacked to where a name says, nothing is run, and what is odd
is reported by name. A listing holds names, sizes and places; images are read one by one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from fqgan_dist.config import parse_config
from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.data.index import INDEX_NAME
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.class_files import read_class_map, rename_classes
from fqgan_dist.sharding.config import FORMATS, NO_CLASSES, SourceFormat, SourceOptions
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.listing import (
    ListingBuilder,
    NewBuilder,
    SourceListing,
    UnlabelledBuilder,
    find_danger,
    is_image_name,
)
from fqgan_dist.sharding.photographs import PhotographsConfig
from fqgan_dist.sharding.sources.file_kinds import (
    COMPRESSIONS,
    HEAD_BYTES,
    FileKind,
    find_file_kind,
)
from fqgan_dist.sharding.sources.file_list import LIST_SUFFIXES, read_image_list
from fqgan_dist.sharding.sources.folder import list_folder
from fqgan_dist.sharding.sources.locations import (
    find_archive,
    folder_exists,
    locate_existing_file,
    source_exists,
)
from fqgan_dist.sharding.sources.named_images import NamedImagesBuilder, OneFileBuilder
from fqgan_dist.sharding.sources.options import check_effect
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
# Members of samples beside their images, as img2dataset and timm write them.
_SAMPLE_SUFFIXES = (".cls", ".json", ".txt", ".cap")
_SHOWN_NAMES = 3


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
    # Read first: listing may take hours.
    class_map = None if chosen.class_map is None else read_class_map(chosen.class_map)
    with _open_kind(kind, uri, chosen, observer, split=split) as listing:
        if class_map is None:
            yield listing
        else:
            yield rename_classes(listing, class_map, str(chosen.class_map))


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
            with _open_named_images(uri, options, observer) as listing:
                yield listing
        case _:
            builder = UnlabelledBuilder if options.class_key == NO_CLASSES else ListingBuilder
            with _open_images(kind, uri, options, observer, builder) as listing:
                yield listing


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
    uri: str, options: SourceOptions, observer: Observer
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
        kind = _find_container(root)
        with observer.track(None, "reading rows", "rows") as bar:
            images = read_image_list(file, uri, options, bar)
        where = options.model_copy(update={"subfolder": subfolder})
        opened = _open_images(kind, root, where, observer, partial(NamedImagesBuilder, images))
        yield replace(stack.enter_context(opened), uri=uri)


def _read_member(archive: str, uri: str, observer: Observer) -> bytes:
    name = uri[len(archive) + 1 :]
    kind, builder = _find_container(archive), partial(OneFileBuilder, name)
    with _open_images(kind, archive, SourceOptions(), observer, builder) as listing:
        return listing.read(0)


def _find_container(uri: str) -> SourceFormat:
    """Tell what holds the images that a list names: a folder, tar or zip.

    Raises:
        ConfigError: it is something else.
        DataError: it is not there.
    """
    if folder_exists(uri):
        return "folder"
    if not source_exists(uri):
        raise DataError(f"root: {uri}: no such folder or archive; correct the path")
    kind = _find_kind_of_file(uri)
    if kind == "zip":
        return "zip"
    if kind == "tar" or kind in COMPRESSIONS:
        return "tar"
    raise ConfigError(f"root: {uri}: not a folder, tar or zip, of which a list can name the images")


def find_format(uri: str, options: SourceOptions) -> SourceFormat:
    """Tell what a source is, by its name and by what is in it.

    Args:
        uri: the source.
        options: what was said of it: a subfolder is a folder of class folders.

    Raises:
        ConfigError: it cannot be told.
        DataError: there is no such source.
    """
    if uri.endswith(LIST_SUFFIXES):
        return "manifest"
    kind = _find_kind_of_file(uri)
    if kind == "tar":
        return "webdataset" if _is_of_samples(uri, options) else "tar"
    if kind is not None:
        return "tar" if kind in COMPRESSIONS else kind
    return "folder" if options.subfolder else _find_format_of_folder(uri)


def _find_kind_of_file(uri: str) -> FileKind | None:
    """Tell what a file is by its first bytes, else by its name; None: no file, or of no known kind.

    Raises:
        DataError: it is of a kind that is not read.
    """
    storage, name = locate_file(uri.rstrip("/"))
    with suppress(FileNotFoundError):
        head = storage.read_bytes(name, length=min(storage.size(name), HEAD_BYTES))
        if kind := find_file_kind(head, uri=uri):
            return kind
    suffixes: dict[FileKind, tuple[str, ...]] = {
        "tar": (PLAIN_SUFFIX, *COMPRESSED_SUFFIXES),
        "zip": (ZIP_SUFFIX,),
        "parquet": (PARQUET_SUFFIX,),
    }
    return next((kind for kind, ends in suffixes.items() if uri.endswith(ends)), None)


def _is_of_samples(uri: str, options: SourceOptions) -> bool:
    """Whether a tar, or several, are shards; else it holds class folders."""
    if options.class_key not in (None, NO_CLASSES):
        return True
    storage, name = locate_file(uri)
    if is_pattern(uri) and not storage.exists(name):
        return True  # else a file of that very name, `x[1].tar`
    if options.subfolder:
        return False
    members = [name.lower().removeprefix("./") for name in first_members(uri, _EXAMINED_MEMBERS)]
    if options.class_key is None:
        return any(name.endswith(".cls") for name in members)
    # Without classes: images with what else belongs to their samples, or at the top, each of which
    # is a sample.
    stems = {name.partition(".")[0] for name in members if is_image_name(name)}
    rest = {name.partition(".")[0] for name in members if name.endswith(_SAMPLE_SUFFIXES)}
    are_at_top = all(name.count(".") == 1 and "/" not in name for name in members)
    return are_at_top or bool(stems & rest)


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
