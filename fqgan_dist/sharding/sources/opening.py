"""What a dataset is made from: a folder, a tar file or the built-in photographs, as one listing.

All are seen as members `class/name.ext`. A listing holds names, sizes and places, never the images;
those are read one by one. A tar is hostile input: nothing is unpacked to the file system, unsafe
members are refused by name, and only members that are named like images are read.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, cast

from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.listing import ListingBuilder, SourceListing
from fqgan_dist.sharding.photographs import (
    PhotographsConfig,
    Split,
    crop_photograph,
    sample_photographs,
)

BUILTIN_PHOTOGRAPHS = "builtin:photographs"

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DECOMPRESSION_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error)
_COPY_BLOCK_BYTES = 4 * 2**20


class Progress(Protocol):
    """Told about work as it is done."""

    def __call__(self, description: str, done: int, total: int, /) -> None:
        """Report `done` of `total` units; a `total` of 0 is not known."""
        ...


def ignore_progress(description: str, done: int, total: int) -> None:
    """Be a `Progress` that shows nothing."""


@contextmanager
def open_source(
    uri: str,
    *,
    subfolder: str = "",
    split: str = "train",
    photographs: PhotographsConfig | None = None,
    progress: Progress = ignore_progress,
) -> Iterator[SourceListing]:
    """List the images of a source and keep it open for reading.

    A compressed tar can only be read in order, but the shards' global permutation reads at random,
    so it is first decompressed, as a stream, to one temporary file (in `TMPDIR`), as is a tar in a
    bucket. A plain tar is read in place.

    Args:
        uri: an image folder, a tar (.gz, .bz2, .xz; a path or s3://), or `builtin:photographs`.
        subfolder: folder inside the source that holds the class folders; the rest is ignored.
        split: part of the photographs, `train` or `val`; no meaning for other sources.
        photographs: how the photographs are cropped; None for other sources.
        progress: told about bytes that are decompressed.

    Raises:
        ConfigError: the source is of no known kind, or an option has no effect on it.
        DataError: the source is missing or damaged, or holds no image.
    """
    if uri == BUILTIN_PHOTOGRAPHS:
        if subfolder:
            raise ConfigError(f"subfolder: {subfolder!r} has no effect on {uri}; leave it out")
        yield _list_photographs(split, photographs or PhotographsConfig())
        return
    if photographs is not None:
        raise ConfigError(f"image_size and crops_per_photograph have no effect on {uri!r}")
    builder = ListingBuilder(uri, subfolder)
    if uri.endswith(_TAR_SUFFIXES):
        with _open_plain_tar(uri, progress) as file:
            _list_tar(file, builder)
            yield builder.build(_TarReader(file.fileno()))
    elif "://" in uri:
        raise ConfigError(
            f"source {uri!r}: expected a tar file there ({', '.join(_TAR_SUFFIXES)}); "
            "pack the folder as a tar, or copy it to a disk"
        )
    else:
        _list_folder(Path(uri), builder)
        yield builder.build(_FolderReader(Path(uri) / subfolder))


def _list_photographs(split: str, config: PhotographsConfig) -> SourceListing:
    if split not in ("train", "val"):
        raise ConfigError(f"split: {split!r}: {BUILTIN_PHOTOGRAPHS} has 'train' and 'val'")
    builder = ListingBuilder(BUILTIN_PHOTOGRAPHS, "")
    crops = sample_photographs(
        cast(Split, split),
        image_size=config.image_size,
        crops_per_photograph=config.crops_per_photograph,
        seed=config.seed,
    )
    for _, name, data in crops:
        builder.add(name, len(data), 0)
    return builder.build(_PhotographReader(cast(Split, split), config))


def _list_folder(root: Path, builder: ListingBuilder) -> None:
    folder = root / builder.subfolder
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{folder}: no such folder; expected class folders with images, a tar file "
            f"({', '.join(_TAR_SUFFIXES)}) or {BUILTIN_PHOTOGRAPHS}"
        ) from error
    prefix = f"{builder.subfolder}/" if builder.subfolder else ""
    for entry in entries:
        if not entry.is_dir():
            builder.add(prefix + entry.name, 0, 0)  # not in a class folder: reported by name
            continue
        files = sorted(os.scandir(entry.path), key=lambda file: file.name)
        for file in files:
            _add_file(f"{prefix}{entry.name}/{file.name}", file, builder)
        if not files:
            builder.skip(f"{prefix}{entry.name}", "an empty class folder")


def _add_file(name: str, entry: os.DirEntry[str], builder: ListingBuilder) -> None:
    # Links are followed: the folder is the user's own, and subsets are often made of links.
    if entry.is_file():
        builder.add(name, entry.stat().st_size, 0)
    elif entry.is_dir():
        builder.skip(name, "a folder inside a class folder")
    else:
        builder.refuse(name, "not a file: a broken link, device or pipe")


def _list_tar(file: IO[bytes], builder: ListingBuilder) -> None:
    """Add the members of an uncompressed tar.

    Raises:
        DataError: the tar is damaged or ends early.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # The members of a tar of a million images would take gigabytes.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
                _add_member(member, builder)
            end = tar.offset
    except (tarfile.TarError, OverflowError, ValueError) as error:
        raise DataError(
            f"{builder.uri}: a damaged tar file ({error}); copy or make it again"
        ) from error
    # tarfile takes the end of the file for the end of the archive, also where it was cut between
    # two members; a whole archive ends with a block of zeros.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{builder.uri}: the tar file is cut off: it has no end mark after {end} bytes; "
            "copy or make it again"
        )


def _add_member(member: tarfile.TarInfo, builder: ListingBuilder) -> None:
    if member.isdir():
        return
    if member.issym() or member.islnk():
        builder.refuse(member.name, f"a link, to {member.linkname!r}")
    elif not member.isreg() or member.issparse():
        builder.refuse(member.name, "neither a plain file nor a folder")
    else:
        builder.add(member.name, member.size, member.offset_data)


@contextmanager
def _open_plain_tar(uri: str, progress: Progress) -> Iterator[IO[bytes]]:
    """Open a tar without compression: a local one in place, others as a temporary copy."""
    folder, name = os.path.split(uri)
    storage = Storage(folder or ".")
    try:
        packed = storage.open_read(name)
        total = storage.size(name)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; correct the path of the tar file") from error
    with packed:
        if storage.is_local and name.endswith(".tar"):
            yield packed
            return
        with tempfile.TemporaryFile(prefix="fqgan-data-") as plain:
            for block in _decompressed_blocks(uri, packed):
                _write_block(plain, block, uri)
                progress("unpacking", packed.tell(), total)
            plain.seek(0)
            yield plain


def _decompressed_blocks(uri: str, packed: IO[bytes]) -> Iterator[bytes]:
    try:
        with _open_decompressor(uri, packed) as stream:
            while block := stream.read(_COPY_BLOCK_BYTES):
                yield block
    except _DECOMPRESSION_ERRORS as error:
        raise DataError(f"{uri}: damaged or cut off ({error}); copy or make it again") from error


def _open_decompressor(uri: str, packed: IO[bytes]) -> IO[bytes]:
    match uri.rpartition(".")[2]:
        case "gz" | "tgz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=packed, mode="rb"))
        case "bz2":
            return cast(IO[bytes], bz2.BZ2File(packed, "rb"))
        case "xz":
            return cast(IO[bytes], lzma.LZMAFile(packed, "rb"))
        case _:
            return packed


def _write_block(plain: IO[bytes], block: bytes, uri: str) -> None:
    try:
        plain.write(block)
        plain.flush()  # so that a full disk shows here
    except OSError as error:
        raise DataError(
            f"{uri}: cannot be unpacked to {tempfile.gettempdir()} ({error}); "
            "set TMPDIR to a folder with room for the uncompressed tar"
        ) from error


class _FolderReader:
    """Reads files below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str, offset: int, size: int) -> bytes:  # noqa: ARG002
        return (self._root / name).read_bytes()


class _TarReader:
    """Reads ranges of a file; `pread` has no position, so any number of threads may read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, name: str, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise DataError(f"{name}: the tar file became shorter while it was read")
        return data


class _PhotographReader:
    """Cuts the crop again that the listing was made with."""

    def __init__(self, split: Split, config: PhotographsConfig) -> None:
        self._split: Split = split
        self._config = config

    def read(self, name: str, offset: int, size: int) -> bytes:  # noqa: ARG002
        class_name, _, file_name = name.partition("/")
        number = int(file_name.removesuffix(".png").rpartition("_")[2])
        config = self._config
        return crop_photograph(class_name, number, self._split, config.image_size, config.seed)
