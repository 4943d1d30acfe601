"""The central directory of a zip, one entry at a time.

Python's `zipfile` makes an object of 0.7 kB of every member, 1 GB for ImageNet; and it does not say
which members overlap. Nothing is unpacked here.

Source: PKWARE APPNOTE 6.3.10, sections 4.3 (layout) and 4.5.3 (zip64).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from fqgan_dist.errors import DataError
from fqgan_dist.storage.storage import Storage

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
LOCAL_SIGNATURE = b"PK\x03\x04"

_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
_CENTRAL_SIGNATURE = b"PK\x01\x02"
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_SIGNATURE = b"PK\x06\x06"
_LOCATOR_64 = struct.Struct("<4sLQL")
_LOCATOR_64_SIGNATURE = b"PK\x06\x07"

_MAX_COMMENT_BYTES = 2**16 - 1
_NOT_HERE = 2**32 - 1
_ZIP64_TAG = 1
_ENCRYPTED_FLAG, _UTF8_FLAG = 0x1, 0x800
_STORED, _DEFLATED = 0, 8
_UNIX = 3


class ZipMember(NamedTuple):
    """An entry of the central directory."""

    name: str
    """Name of the member; a folder's ends with a slash."""
    header_offset: int
    """Where its local header begins in the file."""
    size: int
    """Its bytes when inflated."""
    packed_size: int
    """Its bytes in the file."""
    is_deflated: bool
    """Whether those are deflated; else they are stored."""
    crc: bytes
    """CRC-32 of the inflated bytes, the greatest byte first."""
    fault: str | None
    """Why it cannot be read; None if it can."""


@dataclass(frozen=True)
class ZipDirectory:
    """Where the members of a zip are described."""

    offset: int
    """Where the central directory begins in the file."""
    size: int
    """Its bytes."""
    num_members: int
    """Number of its entries."""
    shift: int
    """Bytes before the archive in the file, which its offsets do not count."""


def find_directory(storage: Storage, name: str, size: int) -> ZipDirectory:
    """Find the central directory of a zip.

    Args:
        storage: where the zip is.
        name: its name there.
        size: its bytes.

    Raises:
        DataError: not a zip, cut off, or in several files.
    """
    uri = storage.uri(name)
    start = max(0, size - _END.size - _MAX_COMMENT_BYTES - _LOCATOR_64.size)
    tail = storage.read_bytes(name, offset=start, length=size - start)
    at = tail.rfind(_END_SIGNATURE)
    while at >= 0 and not _is_end(tail, at):
        at = tail.rfind(_END_SIGNATURE, 0, at)
    if at < 0:
        raise DataError(f"{uri}: not a zip, or cut off: it has no end record; copy it again")
    _, disk, _, num_here, num_members, length, offset, _ = _END.unpack_from(tail, at)
    end = start + at
    is_64 = at >= _LOCATOR_64.size and tail.startswith(_LOCATOR_64_SIGNATURE, at - _LOCATOR_64.size)
    if is_64:
        _, _, stated, _ = _LOCATOR_64.unpack_from(tail, at - _LOCATOR_64.size)
        end, record = _read_end_64(storage, name, start + at - _LOCATOR_64.size, stated)
        _, _, _, _, disk, _, num_here, num_members, length, offset = record
    shift = end - length - offset
    if disk != 0 or num_here != num_members:
        raise DataError(f"{uri}: a part of a zip in several files; join them to one")
    if shift < 0:
        raise DataError(f"{uri}: a damaged zip: its directory lies outside; copy it again")
    return ZipDirectory(offset + shift, length, num_members, shift)


def iterate_members(file: BinaryIO, directory: ZipDirectory, *, uri: str) -> Iterator[ZipMember]:
    """Yield the entries of a central directory.

    Raises:
        DataError: the directory is damaged.
    """
    file.seek(directory.offset)
    for _ in range(directory.num_members):
        header = file.read(_CENTRAL_HEADER.size)
        if len(header) < _CENTRAL_HEADER.size or not header.startswith(_CENTRAL_SIGNATURE):
            raise DataError(f"{uri}: the directory of the zip is damaged; copy or make it again")
        fields = _CENTRAL_HEADER.unpack(header)
        lengths = fields[10:13]
        rest = file.read(sum(lengths))
        if len(rest) < sum(lengths):
            raise DataError(f"{uri}: the directory of the zip is cut off; copy or make it again")
        yield _parse_member(fields, rest, directory)


def _is_end(tail: bytes, at: int) -> bool:
    """Whether the record that begins there is the end of the file, comment included."""
    if at + _END.size > len(tail):
        return False
    return at + _END.size + _END.unpack_from(tail, at)[-1] == len(tail)


def _read_end_64(
    storage: Storage, name: str, locator: int, stated: int
) -> tuple[int, tuple[int, ...]]:
    # It stands just before its locator; only the stated offset is wrong in a file with a prefix.
    for start in (stated, locator - _END_64.size):
        if 0 <= start <= locator - _END_64.size:
            data = storage.read_bytes(name, offset=start, length=_END_64.size)
            if data.startswith(_END_64_SIGNATURE):
                return start, _END_64.unpack(data)
    raise DataError(
        f"{storage.uri(name)}: a damaged zip: its zip64 record is missing; copy it again"
    )


def _parse_member(fields: tuple[int, ...], rest: bytes, directory: ZipDirectory) -> ZipMember:
    _, made_by, _, flags, method, _, _, crc, packed_size, size, name_length, extra_length = fields[
        :12
    ]
    attributes, offset = fields[15:17]
    name = rest[:name_length].decode("utf-8" if flags & _UTF8_FLAG else "cp437", "surrogateescape")
    extra = rest[name_length : name_length + extra_length]
    size, packed_size, offset = _read_zip64(extra, size, packed_size, offset)
    member = ZipMember(
        name=name,
        header_offset=offset + directory.shift,
        size=size,
        packed_size=packed_size,
        is_deflated=method == _DEFLATED,
        crc=crc.to_bytes(4, "big"),
        fault=_find_fault(flags, method, made_by, attributes),
    )
    end = member.header_offset + LOCAL_HEADER.size + name_length + packed_size
    if member.fault is None and end > directory.offset:
        return member._replace(fault="it lies outside of the archive")
    if member.fault is None and method == _STORED and size != packed_size:
        return member._replace(fault=f"stored as {packed_size} bytes, said to have {size}")
    return member


def _read_zip64(extra: bytes, size: int, packed_size: int, offset: int) -> tuple[int, int, int]:
    """Replace the numbers that do not fit into the header by those of the zip64 field."""
    values = [size, packed_size, offset]
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if tag != _ZIP64_TAG:
            continue
        for position, value in enumerate(values):
            if value == _NOT_HERE and len(field) >= 8:
                values[position], field = int.from_bytes(field[:8], "little"), field[8:]
    return values[0], values[1], values[2]


def _find_fault(flags: int, method: int, made_by: int, attributes: int) -> str | None:
    mode = attributes >> 16 if made_by >> 8 == _UNIX else 0
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "neither a plain file nor a folder"
    if flags & _ENCRYPTED_FLAG:
        return "encrypted"
    if method not in (_STORED, _DEFLATED):
        return f"compressed by method {method}; only stored and deflated members are read"
    return None
