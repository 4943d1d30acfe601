"""Images in folders, on a disk or in a bucket."""

from __future__ import annotations

import itertools
import os

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.listing import (
    ListingBuilder,
    NewBuilder,
    Place,
    SourceListing,
    is_folder_of_images,
)
from fqgan_dist.sharding.sources.readers import FileReader
from fqgan_dist.storage.links import find_fault_of_link
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.progress import ProgressBar

_SEARCHED_FOLDERS = 1000


def list_folder(
    uri: str, options: SourceOptions, observer: Observer, new_builder: NewBuilder
) -> SourceListing:
    """List the files `class/name.ext` below a folder, or those of any depth that a builder takes.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    subfolder = options.subfolder.strip("/")
    storage = Storage(uri).child(subfolder)
    builder = new_builder(f"{uri.rstrip('/')}/{subfolder}" if subfolder else uri)
    with observer.track(None, "listing", "files") as bar:
        if not storage.is_local:
            _list_bucket(storage, builder, bar)
        elif builder.lists_all_depths:
            _list_tree(builder.start, (), storage.root, Storage(uri).root, builder, bar)
        else:
            _list_directory(storage.root, Storage(uri).root, builder, bar)
            if not len(builder):
                _look_deeper(storage.root, builder)
    is_shared = options.is_shared or not storage.is_local
    return builder.build("folder", FileReader(storage), is_shared_by_nodes=is_shared)


def _list_bucket(storage: Storage, builder: ListingBuilder, bar: ProgressBar) -> None:
    start = f"{builder.start}/" if builder.start else ""
    for name, size in storage.walk(builder.start):
        if name.startswith("./"):  # an object of that very name, unlike in a tar
            builder.refuse(name, "a name with a '.' part")
        else:
            builder.add(start + name, Place(start + name, 0, size))
        bar.advance()


def _list_tree(
    folder: str,
    above: tuple[str, ...],
    top: str,
    root: str,
    builder: ListingBuilder,
    bar: ProgressBar,
) -> None:
    """List all files below a folder.

    Args:
        folder: its name below `top`; "" is that itself.
        above: the real paths of the folders that led here, as links may lead back to them.
        top: the folder that names are relative to.
        root: the folder that links must not leave.
        builder: takes the files.
        bar: counts them.
    """
    path = os.path.join(top, folder)
    real_path = os.path.realpath(path)
    if real_path in above:
        builder.refuse(folder, "a link to a folder that holds it")
        return
    for entry in _scan(path) if not folder or os.path.isdir(path) else ():
        name = f"{folder}/{entry.name}" if folder else entry.name
        if builder.skip_dropping(name):
            continue
        if entry.is_dir() and not _is_refused(name, entry, root, builder):
            _list_tree(name, (*above, real_path), top, root, builder, bar)
        elif not entry.is_dir():
            _add_file(name, entry, root, builder)
            bar.advance()


def _list_directory(folder: str, root: str, builder: ListingBuilder, bar: ProgressBar) -> None:
    # Not `Storage.walk`, which gives files only: here empty folders and broken links are reported.
    for entry in _scan(folder):
        if builder.skip_dropping(entry.name):
            continue
        if _is_refused(entry.name, entry, root, builder):
            continue
        if not entry.is_dir():
            # Not in a class folder: reported by name.
            builder.add(entry.name, Place(entry.name, 0, 0))
            continue
        files = _scan(entry.path)
        for file in files:
            name = f"{entry.name}/{file.name}"
            if is_folder_of_images(name) and file.is_dir():
                if not _is_refused(name, file, root, builder):
                    for image in _scan(file.path):
                        _add_file(f"{name}/{image.name}", image, root, builder)
            else:
                _add_file(name, file, root, builder)
        if not files:
            builder.skip(entry.name, "an empty class folder")
        bar.advance(len(files))


def _look_deeper(top: str, builder: ListingBuilder) -> None:
    """Look for an image in folders that were not listed, for the error that says where it is."""
    for folder, folders, files in itertools.islice(os.walk(top), _SEARCHED_FOLDERS):
        folders[:] = sorted(name for name in folders if not is_dropping(name))
        inner = os.path.relpath(folder, top)
        for name in sorted(files):
            builder.note_deeper_image(f"{inner}/{name}")


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder}: no folder that can be read ({error.strerror}); expected class folders with "
            "images: correct the path or its permissions"
        ) from error


def _add_file(name: str, entry: os.DirEntry[str], root: str, builder: ListingBuilder) -> None:
    if _is_refused(name, entry, root, builder):
        return
    if entry.is_file():
        builder.add(name, Place(name, 0, entry.stat().st_size))
    elif entry.is_dir():
        if not builder.skip_dropping(name):
            builder.skip(name, "a folder inside a class folder")
    else:
        builder.refuse(name, "not a file: a device, pipe or socket")


def _is_refused(name: str, entry: os.DirEntry[str], root: str, builder: ListingBuilder) -> bool:
    # Links within the source are followed: subsets are often made of links.
    fault = find_fault_of_link(entry.path, root) if entry.is_symlink() else None
    if fault is not None:
        builder.refuse(name, fault)
    return fault is not None
