"""Read members of sources, in any process: the readers hold names, never open files."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from fqgan_dist.data.index import image_digest
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import ImageReader, Place
from fqgan_dist.storage.storage import Storage

_CRC_BYTES = 4


@dataclass(frozen=True)
class FileReader:
    """Reads images that are files of their own."""

    storage: Storage
    """Where the files are."""

    def read(self, name: str, place: Place) -> bytes:
        """Implement `ImageReader`: a file of another size is refused."""
        try:
            data = self.storage.read_bytes(place.file)
        except FileNotFoundError as error:
            raise DataError(describe_change(self.storage, place, name, "it is gone")) from error
        if len(data) != place.size:
            change = f"it has {len(data)} bytes, it was listed with {place.size}"
            raise DataError(describe_change(self.storage, place, name, change))
        return data


@dataclass(frozen=True)
class RangeReader:
    """Reads images that are stored as they are inside of larger files."""

    storage: Storage
    """Where the files are."""

    def read(self, name: str, place: Place) -> bytes:
        """Implement `ImageReader`."""
        data = read_range(self.storage, name, place, place.offset, place.size)
        check_bytes(self.storage, name, place, data)
        return data


@dataclass(frozen=True)
class JoinedReader:
    """Reads from several sources; the first part of a file's name is the number of the source."""

    readers: Sequence[ImageReader]
    """Their readers."""

    def read(self, name: str, place: Place) -> bytes:
        """Implement `ImageReader`."""
        number, _, file = place.file.partition("/")
        return self.readers[int(number)].read(name, place._replace(file=file))


def read_range(storage: Storage, name: str, place: Place, offset: int, size: int) -> bytes:
    """Read a part of the file that holds a member.

    Raises:
        DataError: the file is gone or has become shorter.
    """
    try:
        return storage.read_bytes(place.file, offset=offset, length=size)
    except FileNotFoundError as error:
        raise DataError(describe_change(storage, place, name, "its file is gone")) from error
    except DataError as error:
        if storage.size(place.file) >= offset + size:
            raise
        raise DataError(describe_change(storage, place, name, "its file is shorter")) from error


def check_bytes(storage: Storage, name: str, place: Place, data: bytes) -> None:
    """Compare the bytes of a member with what its source says of them.

    Raises:
        DataError: they are other bytes.
    """
    if not place.check:
        return
    if len(place.check) == _CRC_BYTES:
        found = zlib.crc32(data).to_bytes(_CRC_BYTES, "big")
    else:
        found = image_digest(data)
    if found != place.check:
        change = f"its checksum is {found.hex()}, the source says {place.check.hex()}"
        raise DataError(describe_change(storage, place, name, change))


def describe_change(storage: Storage, place: Place, name: str, change: str) -> str:
    """Say that a member is not the one that was listed."""
    return (
        f"{storage.uri(place.file)}: {name!r} changed while it was read, or is damaged: {change}; "
        "run again when nobody writes to the source, or copy it again"
    )
