"""A tar of images, or of one tar per class as ImageNet comes; perhaps compressed.

A tar is hostile input: nothing is unpacked to the file system, unsafe members are refused by name,
and only members that are named like images are read.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from fqgan_dist.errors import ConfigError, DataError
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.droppings import is_dropping
from fqgan_dist.sharding.file_names import TAR_SUFFIX
from fqgan_dist.sharding.listing import (
    ListingBuilder,
    NewBuilder,
    Place,
    SourceListing,
    find_danger,
    find_fault_of_class,
    show_name,
)
from fqgan_dist.sharding.sources.concurrency import map_in_order
from fqgan_dist.sharding.sources.file_kinds import (
    DECOMPRESSION_ERRORS,
    HEAD_BYTES,
    Compression,
    find_file_kind,
    open_decompressed,
)
from fqgan_dist.sharding.sources.locations import locate_existing_file
from fqgan_dist.sharding.sources.readers import RangeReader
from fqgan_dist.sharding.sources.spool import open_spool_folder, write_spool_file
from fqgan_dist.sharding.tar_scanning import BoundedHeader, describe_rest, make_header_type
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer
from fqgan_dist.telemetry.progress import ProgressBar

_BLOCK_BYTES = 4 * 2**20
# Images do not become smaller: a real dataset of this size expands by less than two.
_MAX_EXPANSION = 100
_HARMLESS_BYTES = 2**30
_MAX_CLASS_TARS = 100_000
# Names and extended headers are read whole; no honest one is as long.
_MAX_HEADER_BYTES = 2**20


@contextmanager
def open_tar(
    uri: str, options: SourceOptions, observer: Observer, new_builder: NewBuilder
) -> Iterator[SourceListing]:
    """List the images of a tar.

    A plain tar is read in place, in a bucket too. A compressed one can only be read in order, but
    the shards' global permutation reads at random, so it is first decompressed, as a stream, to a
    temporary file (in `TMPDIR`).

    Raises:
        ConfigError: a compressed tar is said to be shared by nodes.
        DataError: the tar is missing, damaged or a bomb, or holds no image.
    """
    storage, name, size = locate_existing_file(uri)
    is_shared = options.is_shared or not storage.is_local
    builder = new_builder(uri, options.subfolder)
    head = storage.read_bytes(name, length=min(size, HEAD_BYTES))
    kind = find_file_kind(head, uri=uri)
    if kind in (None, "tar", "zip", "parquet"):
        yield _list_tar(uri, storage, name, size, builder, observer, is_shared=is_shared)
        return
    if options.is_shared:
        raise ConfigError(
            f"is_shared: has no effect on {uri!r}, which is unpacked on this machine; unpack it "
            "where all nodes see it, or leave is_shared out"
        )
    with open_spool_folder() as folder:
        plain = folder / "plain.tar"
        with observer.track(size, "unpacking", "bytes") as bar, storage.open_read(name) as packed:
            blocks = _decompressed_blocks(uri, packed, kind, bar)
            write_spool_file(plain, blocks, uri=uri)
        spool, plain_size = Storage(folder), plain.stat().st_size
        yield _list_tar(uri, spool, plain.name, plain_size, builder, observer, is_shared=False)


def first_members(uri: str, count: int) -> list[str]:
    """Give the names of the first files of a plain tar.

    Raises:
        DataError: the tar is missing or damaged.
    """
    storage, name, size = locate_existing_file(uri)
    names: list[str] = []
    with storage.open_read(name) as file:
        for member in _iterate_members(_Section(file, 0, size), uri):
            names += [member.name] if member.isreg() else []
            if len(names) == count:
                break
    return names


@dataclass
class _ClassTar:
    """A tar inside the tar, which holds the images of a class, and what was found in it."""

    class_name: str
    offset: int
    size: int
    members: list[tuple[str, int, int]] = field(default_factory=list)
    odd: list[tuple[str, str]] = field(default_factory=list)


def _list_tar(
    uri: str,
    storage: Storage,
    name: str,
    size: int,
    builder: ListingBuilder,
    observer: Observer,
    *,
    is_shared: bool,
) -> SourceListing:
    inner: list[_ClassTar] = []
    with storage.open_read(name) as file, observer.track(size, "scanning", "bytes") as bar:
        section = _Section(file, 0, size)
        for member in _iterate_members(section, uri):
            _add_member(member, name, builder, inner)
            bar.advance_to(section.tell())
        bar.advance_to(size)
    with observer.track(len(inner), "listing classes", "classes") as bar:
        _scan_class_tars(uri, storage, name, inner, bar)
    for class_tar in inner:
        _add_class_tar(class_tar, name, builder)
    return builder.build("tar", RangeReader(storage), is_shared_by_nodes=is_shared)


def _add_member(
    member: tarfile.TarInfo, file: str, builder: ListingBuilder, inner: list[_ClassTar]
) -> None:
    reason = _find_odd_kind(member)
    if reason is not None:
        builder.refuse(member.name, reason)
    elif class_name := _class_of_tar(member.name, builder.subfolder):
        if len(inner) == _MAX_CLASS_TARS:
            raise DataError(
                f"{builder.uri}: holds more than {_MAX_CLASS_TARS} tars; expected one per class"
            )
        inner.append(_ClassTar(class_name, member.offset_data, member.size))
    elif not member.isdir():
        builder.add(member.name, Place(file, member.offset_data, member.size))


def _find_odd_kind(member: tarfile.TarInfo) -> str | None:
    """Say why a member is of a dangerous kind; None if it is a file or folder."""
    if member.issym() or member.islnk():
        return f"a link, to {show_name(member.linkname)!r}"
    if not member.isdir() and (not member.isreg() or member.issparse()):
        return "neither a plain file nor a folder"
    return None


def _class_of_tar(name: str, subfolder: str) -> str | None:
    """Give the class whose images a member holds, which is itself a tar; None if it is none."""
    while name.startswith("./"):
        name = name[2:]
    if subfolder:
        head, _, name = name.rpartition("/")
        if head != subfolder:
            return None
    stem = name.removesuffix(TAR_SUFFIX)
    # Of a dropping, `._n01440764.tar`, the builder takes care.
    is_class = stem and stem != name and "/" not in stem and not is_dropping(name)
    return stem if is_class else None


def _scan_class_tars(
    uri: str, storage: Storage, name: str, inner: Sequence[_ClassTar], bar: ProgressBar
) -> None:
    def scan(class_tar: _ClassTar) -> None:
        _scan_class_tar(uri, storage, name, class_tar)

    for _ in map_in_order(storage, scan, inner, bar):
        pass  # each fills its own entry


def _scan_class_tar(uri: str, storage: Storage, name: str, class_tar: _ClassTar) -> None:
    source = f"{uri}: {class_tar.class_name}{TAR_SUFFIX}"
    with storage.open_read(name) as file:
        for member in _iterate_members(_Section(file, class_tar.offset, class_tar.size), source):
            reason = _find_odd_kind(member)
            if reason is not None:
                class_tar.odd.append((member.name, reason))
            elif not member.isdir():
                class_tar.members.append((member.name, member.offset_data, member.size))


def _add_class_tar(class_tar: _ClassTar, file: str, builder: ListingBuilder) -> None:
    class_name = class_tar.class_name
    for name, reason in class_tar.odd:
        builder.refuse(f"{class_name}/{name}", reason)
    for name, offset, size in class_tar.members:
        # Some pack the class folder, not the files in it.
        file_name = name.removeprefix("./").removeprefix(f"{class_name}/")
        if danger := find_fault_of_class(class_name) or find_danger(name):
            builder.refuse(f"{class_name}/{name}", danger)
        else:
            builder.add_below(f"{class_name}/{file_name}", Place(file, offset, size))
    class_tar.members.clear()  # a million of them are in the builder now


def _iterate_members(section: _Section, source: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an uncompressed tar.

    Raises:
        DataError: the tar is damaged or ends early.
    """
    try:
        header_type = make_header_type(BoundedHeader)
        with tarfile.open(fileobj=cast(BinaryIO, section), mode="r:", tarinfo=header_type) as tar:
            while (member := tar.next()) is not None:
                # The members of a tar of a million images would take gigabytes.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
                if member.size < 0:
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                yield member
            end = tar.offset
    # Each extended header before a member is a recursion of tarfile.
    except (tarfile.TarError, OverflowError, ValueError, RecursionError) as error:
        raise DataError(f"{source}: a damaged tar file ({error}); copy or make it again") from error
    # tarfile takes the end of the file for the end of the archive, also where it was cut between
    # two members; a whole archive ends with a block of zeros.
    section.seek(end)
    if section.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{source}: the tar file is cut off: it has no end mark after {end} bytes; "
            "copy or make it again"
        )
    while block := section.read(_MAX_HEADER_BYTES):
        if block.strip(b"\0"):
            raise DataError(describe_rest(source, end))


class _Section(io.RawIOBase):
    """A part of a file, seen by positions in the whole; what lies after it cannot be read."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file = file
        self._end = start + size
        file.seek(start)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a position of the whole file."""
        assert whence == os.SEEK_SET, "tarfile seeks from the beginning"
        return self._file.seek(offset)

    def tell(self) -> int:
        """Give the position in the whole file."""
        return self._file.tell()

    def read(self, size: int = -1, /) -> bytes:
        """Read a header; a larger part is refused, as tarfile reads headers of any size."""
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(max(0, min(size, self._end - self._file.tell())))


def _decompressed_blocks(
    uri: str, packed: BinaryIO, compression: Compression, bar: ProgressBar
) -> Iterator[bytes]:
    num_bytes = 0
    try:
        with open_decompressed(packed, compression) as stream:
            while block := stream.read(_BLOCK_BYTES):
                num_bytes += len(block)
                if num_bytes > max(_HARMLESS_BYTES, _MAX_EXPANSION * packed.tell()):
                    raise DataError(
                        f"{uri}: a decompression bomb: its first {packed.tell()} bytes expand to "
                        f"more than {num_bytes}; images expand very little: do not use it"
                    )
                yield block
                bar.advance_to(packed.tell())
    except DECOMPRESSION_ERRORS as error:
        raise DataError(f"{uri}: damaged or cut off ({error}); copy or make it again") from error
