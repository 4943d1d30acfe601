"""Tell what a source is, and which files belong to it: by names, first bytes and contents."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

from fqgan_dist.data.config import BUILTIN_PHOTOGRAPHS
from fqgan_dist.data.index import INDEX_NAME
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.config import NO_CLASSES, SourceFormat, SourceOptions
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.file_names import (
    ARCHIVE_SUFFIXES,
    COMPRESSED_SUFFIXES,
    LIST_SUFFIXES,
    PARQUET_SUFFIX,
    TAR_SUFFIX,
    ZIP_SUFFIX,
    is_image_name,
)
from fqgan_dist.sharding.listing import find_danger
from fqgan_dist.sharding.sources.file_kinds import (
    COMPRESSIONS,
    HEAD_BYTES,
    FileKind,
    find_file_kind,
)
from fqgan_dist.sharding.sources.locations import (
    expand_folders,
    folder_exists,
    locate_files,
    source_exists,
)
from fqgan_dist.sharding.sources.shard_pattern import is_pattern, match_pattern
from fqgan_dist.sharding.sources.splits import choose_files, find_split_folder
from fqgan_dist.sharding.sources.tar_archive import first_members
from fqgan_dist.storage.storage import Storage, locate_file

_EXAMINED_MEMBERS = 32
_EXAMINED_NAMES = 20
_MAX_DEPTH = 3
# Members of samples beside their images, as img2dataset and timm write them.
_SAMPLE_SUFFIXES = (".cls", ".json", ".txt", ".cap")
_SHOWN_NAMES = 3
# Of these every file is a source of its own; shards and tables are one together.
_TAR_SUFFIXES = (TAR_SUFFIX, *COMPRESSED_SUFFIXES)
_SUFFIXES: dict[SourceFormat, tuple[str, ...]] = {
    "tar": _TAR_SUFFIXES,
    "zip": (ZIP_SUFFIX,),
    "manifest": LIST_SUFFIXES,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundSource:
    """What a user named."""

    kind: SourceFormat
    """What it is."""
    uris: list[str]
    """What is opened; several are joined."""
    subfolder: str = ""
    """Folder of each that holds the class folders, or the images of a list."""
    images: str | None = None
    """Pattern of the names of the images that are meant; None: all."""
    other_splits: Collection[str] = ()
    """Splits whose files or folders lie beside these."""


def find_source(uri: str, options: SourceOptions, split: str) -> FoundSource:
    """Find out what a user named.

    Args:
        uri: a folder, a file, or a pattern of several.
        options: what was said of it.
        split: which part of it is meant, where it has several.

    Raises:
        ConfigError: it cannot be told.
        DataError: there is no such source.
    """
    images = options.files
    if images is not None and _names_files(uri, images):
        uri, images = f"{uri.rstrip('/')}/{images}", None
    uris = expand_folders(uri)
    other_splits: set[str] = set()
    subfolder = options.subfolder.strip("/")
    if options.format == "auto" and subfolder and len(uris) == 1:
        # Below the source, not a source of its own: links may lead to all that it holds.
        inner, others = _descend(f"{uris[0].rstrip('/')}/{subfolder}", options, split)
        subfolder = inner[len(uris[0].rstrip("/")) + 1 :]
        other_splits |= others
    elif options.format == "auto":
        found = [_descend(each, options, split) for each in uris]
        uris = [each for each, _ in found]
        other_splits.update(*(others for _, others in found))
    kind = find_format(uris[0], options) if options.format == "auto" else options.format
    files: list[str] = []
    for each in uris:
        chosen, others = _list_files(each, kind, split)
        files += chosen
        other_splits.update(others)
    return FoundSource(kind, files, subfolder, images, other_splits)


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
    first = _first_of(uri)
    if first != uri and folder_exists(first):
        return find_format(first, options)
    kind = find_kind_of_file(first)
    if kind == "tar":
        return "webdataset" if _is_of_samples(first, options, is_only=first == uri) else "tar"
    if kind == "zip" or kind == "parquet":
        return kind
    if kind is not None:
        return "tar"  # a compressed one
    return "folder" if options.subfolder else _find_format_of_folder(uri, options)


def find_container(uri: str) -> SourceFormat:
    """Tell what holds the images that a list names: a folder, tar or zip.

    Raises:
        ConfigError: it is something else.
        DataError: it is not there.
    """
    if folder_exists(uri):
        return "folder"
    if not source_exists(uri):
        raise DataError(f"root: {uri}: no such folder or archive; correct the path")
    kind = find_kind_of_file(uri)
    if kind == "zip":
        return "zip"
    if kind == "tar" or kind in COMPRESSIONS:
        return "tar"
    raise ConfigError(f"root: {uri}: not a folder, tar or zip, of which a list can name the images")


def find_kind_of_file(uri: str) -> FileKind | None:
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
        "tar": _TAR_SUFFIXES,
        "zip": (ZIP_SUFFIX,),
        "parquet": (PARQUET_SUFFIX,),
    }
    return next((kind for kind, ends in suffixes.items() if uri.endswith(ends)), None)


def _names_files(folder: str, pattern: str) -> bool:
    """Whether a pattern is of files of a folder that hold images or name them."""
    if is_pattern(folder) or not folder_exists(folder):
        return False
    inner, _, last = pattern.rpartition("/")
    if inner and not folder_exists(f"{folder.rstrip('/')}/{inner}"):
        return False
    found, _ = match_pattern(last, Storage(folder).child(inner).list())
    return any(name.endswith((*ARCHIVE_SUFFIXES, *LIST_SUFFIXES)) for name in found)


def _descend(uri: str, options: SourceOptions, split: str) -> tuple[str, set[str]]:
    """Go down to the folder of a split, or to the only one that holds data, as on the Hub.

    Returns:
        The folder, and the splits beside it.
    """
    others: set[str] = set()
    start = uri
    for _ in range(_MAX_DEPTH):
        if is_pattern(uri) or not folder_exists(uri):
            break
        storage = Storage(uri)
        names = [name for name in storage.list() if not is_dropping(name)]
        if any(name.endswith(ARCHIVE_SUFFIXES) for name in names):
            break
        chosen, beside = find_split_folder(uri, split, has_classes=options.class_key != NO_CLASSES)
        if chosen is None:
            folders = _find_folders(storage, names)
            files = storage.child(folders[0]).list() if len(folders) == 1 else []
            if not any(name.endswith((TAR_SUFFIX, PARQUET_SUFFIX)) for name in files):
                break
            chosen = folders[0]
        others.update(beside)
        uri = f"{uri.rstrip('/')}/{chosen}"
    if uri != start:
        logger.info("%s: %s is read", start, uri)
    return uri, others


def _list_files(uri: str, kind: SourceFormat, split: str) -> tuple[list[str], Collection[str]]:
    """Give the sources that a URI stands for, and the splits of files beside them."""
    suffixes = _SUFFIXES.get(kind)
    if is_pattern(uri):
        storage, names = locate_files(uri)
        head = uri[: len(uri) - len(uri.rpartition("/")[2])]
        if names == [uri.rpartition("/")[2]]:
            return [uri], ()
        if suffixes is None and any(map(storage.exists, names[:1])):
            return [uri], ()  # of shards or tables, which are one source
    elif suffixes is not None and not uri.endswith(suffixes) and folder_exists(uri):
        names = [
            name
            for name in Storage(uri).list()
            if name.lower().endswith(suffixes) and not is_dropping(name)
        ]
        if not names:
            raise DataError(f"{uri}: no {'/'.join(suffixes)} files; correct the path or the format")
        head = f"{uri.rstrip('/')}/"
    else:
        return [uri], ()
    chosen = choose_files(uri, names, split)
    return [head + name for name in chosen.files], chosen.other_splits


def _first_of(uri: str) -> str:
    """Give the first file or folder that a pattern stands for; another URI stays as it is."""
    if not is_pattern(uri):
        return uri
    _, found = locate_files(uri)
    return uri[: len(uri) - len(uri.rpartition("/")[2])] + found[0]


def _is_of_samples(uri: str, options: SourceOptions, *, is_only: bool) -> bool:
    """Whether a tar, the only one or the first of several, is a shard; else of class folders."""
    if options.class_key not in (None, NO_CLASSES):
        return True
    if options.subfolder:
        return False
    try:
        names = [name.lower().removeprefix("./") for name in first_members(uri, _EXAMINED_MEMBERS)]
    except DataError:
        if is_only:
            raise
        return True  # said of all shards when they are read
    names = [name for name in names if not any(map(is_dropping, name.split("/")))]
    if any(name.endswith(".cls") for name in names):
        return True
    stems = {_stem_of(name) for name in names if is_image_name(name)}
    companions = {_stem_of(name) for name in names if name.endswith(_SAMPLE_SUFFIXES)}
    if options.class_key == NO_CLASSES:
        # Images with what else belongs to their samples, or at the top, each of which is a sample.
        are_at_top = all(name.count(".") == 1 and "/" not in name for name in names)
        return are_at_top or bool(stems & companions)
    if is_only:
        return False
    are_in_folders = all(name.count("/") == 1 for name in names if is_image_name(name))
    holds_tars = any(name.endswith(TAR_SUFFIX) for name in names)
    return not (holds_tars or (stems and are_in_folders and not stems & companions))


def _stem_of(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _find_format_of_folder(uri: str, options: SourceOptions) -> SourceFormat:
    storage = Storage(uri)
    names = [name for name in storage.list() if not is_dropping(name)]
    if not names and not folder_exists(uri):
        if source_exists(uri):
            raise ConfigError(f"{uri}: a file of no known ending; say what it is with format=...")
        raise DataError(
            f"{uri}: no such folder; expected class folders with images, a tar, zip, WebDataset "
            f"shards, parquet, a list of images, or {BUILTIN_PHOTOGRAPHS}"
        )
    folders = _find_folders(storage, names)
    files: dict[SourceFormat, list[str]] = {
        "webdataset": [name for name in names if name.endswith(TAR_SUFFIX)],
        "parquet": [name for name in names if name.endswith(PARQUET_SUFFIX)],
        "zip": [name for name in names if name.endswith(ZIP_SUFFIX)],
        "tar": [name for name in names if name.endswith(COMPRESSED_SUFFIXES)],
    }
    if INDEX_NAME in names and not folders:
        return "webdataset"
    if files["webdataset"]:
        # Tables of what shards hold: img2dataset's of each, and those of our datasets.
        ends = (TAR_SUFFIX, ".json")
        stems = {name.partition(".")[0] for name in names if name.endswith(ends)}
        files["parquet"] = [
            name for name in files["parquet"] if name.partition(".")[0] not in stems
        ]
    found: dict[SourceFormat, list[str]] = {kind: names for kind, names in files.items() if names}
    if not found:
        return "folder"
    if folders or len(found) > 1:
        kinds: list[SourceFormat] = [*found]
        shown = [names[0] for names in found.values()]
        if folders:
            kinds.insert(0, "folder")
            shown += folders[:_SHOWN_NAMES]
        raise ConfigError(
            f"{uri}: holds several kinds of data ({', '.join(map(repr, shown))}); say which to "
            f"read with {' or '.join(f'format={kind}' for kind in kinds)}, or name it"
        )
    (kind, (first, *_)), *_ = found.items()
    if kind == "webdataset":
        path = f"{uri.rstrip('/')}/{first}"
        return "webdataset" if _is_of_samples(path, options, is_only=False) else "tar"
    return kind


def _find_folders(storage: Storage, names: list[str]) -> list[str]:
    # Those without an ending first: usually classes. Some are enough, as each costs a request.
    # Names that the storage would refuse are left to the listing, which reports them.
    safe = (name for name in names if find_danger(name) is None)
    likely = sorted(safe, key=lambda name: ("." in name, name))[:_EXAMINED_NAMES]
    return [name for name in likely if not storage.exists(name)]
