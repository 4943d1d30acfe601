"""One pass over a tar that somebody else made: its hash, its members and their places.

Tars are hostile input. Only plain tars are read (a compressed one could expand to anything), as a
stream and with bounded memory; nothing is unpacked to the file system, unpickled or run; a member
is read into memory only where the caller asks for it, and only up to a limit.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, TypeVar, cast

from webdataset.tariterators import base_plus_ext

from fqgan_dist.data.index import is_safe_key
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import MAX_IMAGE_BYTES, find_danger, show_name
from fqgan_dist.storage.hashing import HashedStream

MAX_MEMBER_BYTES = MAX_IMAGE_BYTES
"""Largest member that is read."""

UNPICKLED_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})
"""Endings of members that webdataset's `decode()` would unpickle, and so run what is in them."""

_BUFFER_BYTES = 2**16
"""tarfile copies what is left of its buffer at each of its reads: a larger one is slower."""
_MAX_HEADER_BYTES = 2**20
_MAX_GLOBAL_BYTES = 2**14
_MAX_SAMPLE_MEMBERS = 1000
_MAX_SAMPLE_BYTES = 2 * MAX_MEMBER_BYTES
_LONG_NUMBER = re.compile(rb"[0-9]{21}")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset leaves such members out
_EXTENDED_HEADERS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)


@dataclass(frozen=True)
class TarMember:
    """A member of a tar."""

    name: str
    """Its name, without a leading `./`."""
    offset: int
    """Where its bytes begin in the tar."""
    size: int
    """Number of its bytes."""
    data: bytes | None
    """Its bytes, where they were asked for."""
    danger: str | None
    """Why it must not be used; None if it may be."""

    @property
    def key(self) -> str:
        """What comes before the first dot of the last part of the name, as webdataset has it.

        "" where webdataset leaves the member out: no dot, or `__meta__/...`.
        """
        return "" if _META.match(self.name) else base_plus_ext(self.name)[0] or ""

    @property
    def suffix(self) -> str:
        """What comes after that dot, in small letters."""
        return (base_plus_ext(self.name)[1] or "").lower()


@dataclass(frozen=True)
class TarSample:
    """Members of one key that stand beside each other: a sample of webdataset."""

    key: str
    """The key."""
    members: list[TarMember]
    """The members that may be used, in the order of the tar."""

    def find(self, *suffixes: str) -> list[TarMember]:
        """Give the members with one of these suffixes."""
        return [member for member in self.members if member.suffix in suffixes]


class TarScan:
    """Reads a tar once, from front to back, and hashes what passes."""

    def __init__(self, file: BinaryIO, *, source: str) -> None:
        """Scan a file at its beginning.

        Args:
            file: the tar.
            source: its name, for errors.
        """
        # tarfile steps over a member block by block, also behind the end of the file: a header of
        # 512 bytes that states 2**88 of them would take it forever.
        self._blocks_end = -(-file.seek(0, io.SEEK_END) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        file.seek(0)
        self._stream = HashedStream(file)
        self._source = source
        self._end: int | None = None

    def members(self, is_wanted: Callable[[str], bool]) -> Iterator[TarMember]:
        """Yield the members but folders, with the bytes of those whose name is wanted.

        Raises:
            DataError: not a plain tar, damaged, or cut off.
        """
        header_type = make_header_type(_Header)
        try:
            with tarfile.open(
                fileobj=self._stream, mode="r|", bufsize=_BUFFER_BYTES, tarinfo=header_type
            ) as archive:
                while (info := archive.next()) is not None:
                    # The members of a tar of a million images would take gigabytes.
                    archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
                    if archive.offset > self._blocks_end:
                        raise tarfile.ReadError(
                            f"{show_name(info.name)!r} of {info.size} bytes ends behind the file"
                        )
                    if not info.isdir():
                        yield _read_member(archive, info, is_wanted)
                end = archive.offset
        # Each extended header before a member is a recursion of tarfile.
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(
                f"{self._source}: not a whole, plain tar archive ({error}); expected one that is "
                "not compressed: unpack it, or copy it again"
            ) from error
        # tarfile ends without a word where a file is cut off between two members.
        if not header_type.found_end:
            raise DataError(
                f"{self._source}: the tar file is damaged or cut off: it has no end mark; "
                "copy or make it again"
            )
        self._end = end

    def finish(self) -> tuple[str, int]:
        """Read what is left and give the sha256 (hex) and the size of the whole file.

        Raises:
            DataError: there is more behind the end mark of the members that were read.
        """
        found = self._stream.finish()
        if self._end is not None and self._stream.content_end > self._end:
            raise DataError(describe_rest(self._source, self._end))
        return found


def describe_rest(source: str, end: int) -> str:
    """Say that a tar goes on behind its end mark, where no reader of tars looks."""
    return (
        f"{source}: the tar goes on behind its end mark at byte {end}: several archives in one "
        "file, as `cat` puts them together; expected one archive, as `tar --concatenate` makes: "
        "what comes behind would be passed over"
    )


def group_samples(members: Iterable[TarMember]) -> Iterator[TarSample]:
    """Put neighbours of one key together; members that may not be used are left out.

    Raises:
        DataError: one key has more members, or bytes, than can be held.
    """
    usable = (member for member in members if member.danger is None and member.key)
    for key, group in groupby(usable, key=lambda member: member.key):
        sample = TarSample(key, [])
        num_bytes = 0
        for member in group:
            sample.members.append(member)
            num_bytes += len(member.data or b"")
            if len(sample.members) > _MAX_SAMPLE_MEMBERS or num_bytes > _MAX_SAMPLE_BYTES:
                raise DataError(
                    f"sample {key!r}: its first {len(sample.members)} members have {num_bytes} "
                    f"bytes; expected at most {_MAX_SAMPLE_MEMBERS} of {_MAX_SAMPLE_BYTES}: give "
                    "each sample a key of its own"
                )
        yield sample


def _read_member(
    archive: tarfile.TarFile, info: tarfile.TarInfo, is_wanted: Callable[[str], bool]
) -> TarMember:
    if info.size < 0:  # by an extended header, which comes after the check of the header itself
        raise tarfile.ReadError(f"a member of {info.size} bytes")
    name = info.name
    while name.startswith("./"):
        name = name[2:]
    danger = _find_member_danger(name, info)
    data = None
    if danger is None and is_wanted(name):
        stream = archive.extractfile(info)
        assert stream is not None, "a plain member has bytes"
        data = stream.read()
    return TarMember(show_name(name) if danger else name, info.offset_data, info.size, data, danger)


def _find_member_danger(name: str, info: tarfile.TarInfo) -> str | None:
    """Say why a member must not be used; None if it may be."""
    if info.issym() or info.islnk():
        return f"a link, to {show_name(info.linkname)!r}"
    if not info.isreg() or info.issparse():
        return "neither a plain file nor a folder"
    if danger := find_danger(name):
        return danger
    key, suffix = base_plus_ext(name)
    if _META.match(name) or key is None or suffix is None:
        return None  # belongs to no sample
    if not is_safe_key(key) or not suffix.isprintable():
        return "not a relative name of at most 200 printable characters"
    if suffix.lower().rpartition(".")[2] in UNPICKLED_SUFFIXES:
        return "a pickle: loading it would run what it holds; it is never read"
    if info.size > MAX_MEMBER_BYTES:
        return f"{info.size} bytes; a member may have {MAX_MEMBER_BYTES}"
    return None


class BoundedHeader(tarfile.TarInfo):
    """A header that costs no more than its bytes; a class of its own for each archive.

    tarfile reads an extended header of any size whole, looks in it for numbers in quadratic time
    (Python before 3.11.10 and 3.12.6: hours for a megabyte of digits), and applies the values of
    global ones to every member.
    """

    global_bytes = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        """Read a header block."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        if header.type in _EXTENDED_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes")
        if header.type == tarfile.XGLTYPE:
            cls.global_bytes += header.size
            if cls.global_bytes > _MAX_GLOBAL_BYTES:
                raise tarfile.ReadError(f"global headers of {cls.global_bytes} bytes")
        return header

    def _proc_pax(self, tarfile_: Any) -> tarfile.TarInfo:
        """Look at an extended header before tarfile does."""
        file = tarfile_.fileobj
        data = file.read(-(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if _LONG_NUMBER.search(data):
            raise tarfile.ReadError("an extended header with a number of more than 20 digits")
        tarfile_.fileobj = _Replay(data, file)
        try:
            return super()._proc_pax(tarfile_)  # pyright: ignore[reportAttributeAccessIssue]  # private
        finally:
            tarfile_.fileobj = file


class _Replay:
    """A file whose next bytes were read already."""

    def __init__(self, data: bytes, file: Any) -> None:
        self._data = data
        self._file = file

    def read(self, size: int) -> bytes:
        data, self._data = self._data, b""
        return data or self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Header(BoundedHeader):
    """A header that says whether the end mark was seen.

    tarfile takes any damaged header after the first member for the end of the archive.
    """

    found_end = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        """Read a header block."""
        cls.found_end = len(buf) == tarfile.BLOCKSIZE and not any(buf)
        return super().frombuf(buf, encoding, errors)


HeaderT = TypeVar("HeaderT", bound=BoundedHeader)


def make_header_type(base: type[HeaderT]) -> type[HeaderT]:
    """Make a class of its own for a scan: tarfile wants a class, and it holds the scan's state."""
    return cast("type[HeaderT]", type(base.__name__, (base,), {}))
