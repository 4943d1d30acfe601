"""Class folders with images, on a disk or in a bucket."""

from __future__ import annotations

import os

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import ListingBuilder, Place, SourceListing
from fqgan_dist.sharding.sources.options import SourceOptions
from fqgan_dist.sharding.sources.readers import FileReader
from fqgan_dist.storage.links import find_fault_of_link
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.progress import ProgressBar


def list_folder(uri: str, options: SourceOptions, observer: Observer) -> SourceListing:
    """List the files `class/name.ext` below a folder.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    subfolder = options.subfolder.strip("/")
    storage = Storage(uri).child(subfolder)
    builder = ListingBuilder(f"{uri.rstrip('/')}/{subfolder}" if subfolder else uri)
    with observer.track(None, "listing", "files") as bar:
        if storage.is_local:
            _list_directory(storage.root, Storage(uri).root, builder, bar)
        else:
            _list_bucket(storage, builder, bar)
    is_shared = options.is_shared or not storage.is_local
    return builder.build("folder", FileReader(storage), is_shared_by_nodes=is_shared)


def _list_bucket(storage: Storage, builder: ListingBuilder, bar: ProgressBar) -> None:
    for name, size in storage.walk():
        if name.startswith("./"):  # an object of that very name, unlike in a tar
            builder.refuse(name, "a name with a '.' part")
        else:
            builder.add(name, Place(name, 0, size))
        bar.advance()


def _list_directory(folder: str, root: str, builder: ListingBuilder, bar: ProgressBar) -> None:
    # Not `Storage.walk`, which gives files only: here empty folders and broken links are reported.
    for entry in _scan(folder):
        if builder.skip_dropping(entry.name):
            continue
        if entry.is_symlink() and (fault := find_fault_of_link(entry.path, root)):
            builder.refuse(entry.name, fault)
            continue
        if not entry.is_dir():
            # Not in a class folder: reported by name.
            builder.add(entry.name, Place(entry.name, 0, 0))
            continue
        files = _scan(entry.path)
        for file in files:
            _add_file(f"{entry.name}/{file.name}", file, root, builder)
        if not files:
            builder.skip(entry.name, "an empty class folder")
        bar.advance(len(files))


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder}: no folder that can be read ({error.strerror}); expected class folders with "
            "images: correct the path or its permissions"
        ) from error


def _add_file(name: str, entry: os.DirEntry[str], root: str, builder: ListingBuilder) -> None:
    # Links within the source are followed: subsets are often made of links.
    if entry.is_symlink() and (fault := find_fault_of_link(entry.path, root)):
        builder.refuse(name, fault)
    elif entry.is_file():
        builder.add(name, Place(name, 0, entry.stat().st_size))
    elif entry.is_dir():
        if not builder.skip_dropping(name):
            builder.skip(name, "a folder inside a class folder")
    else:
        builder.refuse(name, "not a file: a device, pipe or socket")
