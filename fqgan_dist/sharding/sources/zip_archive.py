"""A zip of images, read in place by ranges, in a bucket too."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from fqgan_dist.errors import DataError
from fqgan_dist.sharding.config import SourceOptions
from fqgan_dist.sharding.listing import ListingBuilder, NewBuilder, Place, SourceListing
from fqgan_dist.sharding.sources.locations import locate_existing_file
from fqgan_dist.sharding.sources.readers import check_bytes, describe_change, read_range
from fqgan_dist.sharding.sources.zip_directory import (
    LOCAL_HEADER,
    LOCAL_SIGNATURE,
    ZipMember,
    find_directory,
    iterate_members,
)
from fqgan_dist.storage.storage import Storage
from fqgan_dist.telemetry.observer import Observer

# Images do not become smaller; what expands so much is no image, or a single colour.
_MAX_EXPANSION = 100
_HARMLESS_BYTES = 2**20
# Bytes that follow every member's data at least: an entry of the directory (46 bytes and the name)
# and the end record (22). So a name and extra fields of as many bytes come with the first read.
_READ_AHEAD_BYTES = 68


def list_zip(
    uri: str, options: SourceOptions, observer: Observer, new_builder: NewBuilder
) -> SourceListing:
    """List the images of a zip.

    Raises:
        DataError: the zip is missing, damaged or a bomb, or holds no image.
    """
    storage, name, size = locate_existing_file(uri)
    directory = find_directory(storage, name, size)
    builder = new_builder(uri, options.subfolder, check_bytes=4)
    with (
        storage.open_read(name) as file,
        observer.track(directory.num_members, "listing", "files") as bar,
    ):
        for member in iterate_members(file, directory, uri=uri):
            _add_member(member, name, builder)
            bar.advance()
    is_shared = options.is_shared or not storage.is_local
    listing = builder.build("zip", ZipReader(storage), is_shared_by_nodes=is_shared)
    _check_overlaps(listing)
    return listing


def _add_member(member: ZipMember, file: str, builder: ListingBuilder) -> None:
    if member.fault is not None:
        builder.refuse(member.name, member.fault)
    elif member.size > max(_HARMLESS_BYTES, _MAX_EXPANSION * member.packed_size):
        reason = f"a decompression bomb: {member.packed_size} bytes expand to {member.size}"
        builder.refuse(member.name, reason)
    elif not member.name.endswith("/"):
        packed_size = member.packed_size if member.is_deflated else 0
        place = Place(file, member.header_offset, member.size, packed_size, member.crc)
        builder.add(member.name, place)


def _check_overlaps(listing: SourceListing) -> None:
    """Refuse a zip whose members share bytes, by which a small file holds many large members.

    Raises:
        DataError: two members overlap.
    """
    order = np.argsort(listing.offsets, kind="stable")
    taken = np.where(listing.packed_sizes > 0, listing.packed_sizes, listing.sizes)
    ends = (listing.offsets + LOCAL_HEADER.size + taken)[order]
    late = np.flatnonzero(ends[:-1] > listing.offsets[order][1:])
    if len(late):
        first, second = (listing.names[order[late[0] + step]] for step in (0, 1))
        raise DataError(
            f"{listing.uri}: {first!r} and {second!r} overlap: a decompression bomb, or a damaged "
            "zip; make it again"
        )


@dataclass(frozen=True)
class ZipReader:
    """Reads stored and deflated members; never inflates more than was listed."""

    storage: Storage
    """Where the zip is."""

    def read(self, name: str, place: Place) -> bytes:
        """Implement `ImageReader`."""
        packed_size = place.packed_size or place.size
        # How long the local header's name and extra field are stands in that header alone (the
        # directory's may differ): a few bytes more spare a second request.
        first = LOCAL_HEADER.size + packed_size + _READ_AHEAD_BYTES
        data = read_range(self.storage, name, place, place.offset, first)
        if not data.startswith(LOCAL_SIGNATURE):
            raise DataError(describe_change(self.storage, place, name, "no member is there"))
        name_length, extra_length = LOCAL_HEADER.unpack_from(data)[-2:]
        start = LOCAL_HEADER.size + name_length + extra_length
        if missing := max(0, start + packed_size - first):
            data += read_range(self.storage, name, place, place.offset + first, missing)
        image = data[start : start + packed_size]
        if place.packed_size:
            image = self._inflate(image, name, place)
        check_bytes(self.storage, name, place, image)
        return image

    def _inflate(self, packed: bytes, name: str, place: Place) -> bytes:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte more than listed: enough to tell a lie, and all that a bomb gets.
            data = inflater.decompress(packed, place.size + 1)
        except zlib.error as error:
            change = f"it does not inflate ({error})"
            raise DataError(describe_change(self.storage, place, name, change)) from error
        if len(data) != place.size:
            more = "more" if len(data) > place.size else "less"
            change = f"it inflates to {more} than the {place.size} bytes that it is said to have"
            raise DataError(describe_change(self.storage, place, name, change))
        return data
