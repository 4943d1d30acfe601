"""What a file is by its first bytes, whatever its name says; and how compressed ones are read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from typing import BinaryIO, Literal, cast, get_args

import pyarrow as pa

from fqgan_dist.errors import DataError

Compression = Literal["gzip", "bzip2", "xz", "zstd"]
FileKind = Literal["zip", "tar", "parquet"] | Compression

COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)
"""Kinds of files that are only compressed, as a tar may be."""
HEAD_BYTES = 512
"""Bytes from the beginning of a file by which it is known."""
DECOMPRESSION_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""What a stream raises that is damaged or cut off."""

_MAGICS: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"\x1f\x8b", "gzip"),
    (0, b"BZh", "bzip2"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"\x50\x2a\x4d\x18", "zstd"),  # a skippable frame before, as pzstd writes it
    (0, b"PK\x03\x04", "zip"),
    (0, b"PAR1", "parquet"),
    (257, b"ustar", "tar"),
)
# What is not read, and the command that makes a folder of it.
_UNREAD = (
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x"),
    (b"Rar!\x1a\x07", "a RAR archive", "unrar x"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4", "lz4 -d"),
    (b"LZIP", "compressed with lzip", "lzip -d"),
    (b"\x1f\x9d", "compressed with compress", "uncompress"),
)


def find_file_kind(head: bytes, *, uri: str) -> FileKind | None:
    """Tell what a file is.

    Args:
        head: its first `HEAD_BYTES`, or all of it.
        uri: its name, for the error.

    Returns:
        None where nothing tells, as of tars older than POSIX.

    Raises:
        DataError: it is of a kind that is not read.
    """
    for magic, what, command in _UNREAD:
        if head.startswith(magic):
            raise DataError(
                f"{uri}: {what}, which is not read; expected a tar (.gz, .bz2, .xz or .zst), a zip "
                f"or a folder: unpack it with `{command}`"
            )
    return next((kind for at, magic, kind in _MAGICS if head.startswith(magic, at)), None)


def open_decompressed(packed: BinaryIO, compression: Compression) -> BinaryIO:
    """Open what a file holds, as a stream; reading raises one of `DECOMPRESSION_ERRORS`."""
    match compression:
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=packed, mode="rb"))
        case "bzip2":
            return cast(BinaryIO, bz2.BZ2File(packed, "rb"))
        case "xz":
            return cast(BinaryIO, lzma.LZMAFile(packed, "rb"))
        case "zstd":
            return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(packed, "r"), "zstd"))
