"""A whole shard from front to back, by the places in its table of samples.

Shards are hostile input, and not all are of our making. So nothing in the tar is parsed, named or
expanded: the table, which the index pins, says where each image's bytes are and what they hash to;
other members are passed over. The stream is opened by our storage (webdataset would run `pipe:`
URLs through a shell, unpickle `.pkl` members and expand compressed archives).
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from fqgan_dist.data.index import (
    SampleTable,
    ShardEntry,
    image_digest,
    load_samples,
)
from fqgan_dist.errors import DataError
from fqgan_dist.storage.hashing import HashedStream
from fqgan_dist.storage.storage import Storage

_MARK = slice(257, 262)
_BLOCK_BYTES = 2**20

logger = logging.getLogger(__name__)


def iterate_shard(folder: Storage, entry: ShardEntry) -> Iterator[tuple[str, int, bytes]]:
    """Yield key, label and encoded image of every sample of a shard, in the order of its table.

    Every image is verified before it is given out. The hash of the whole shard is known only after
    the last one.

    Args:
        folder: of the dataset.
        entry: the shard.

    Raises:
        DataError: the shard or its table is missing, not a plain tar, damaged, or not the one of
            the index.
    """
    table = load_samples(folder, entry)
    samples = iterate_images(folder, entry, table, is_strict=True)
    for row, (key, data) in enumerate(zip(table.keys, samples, strict=True)):
        if isinstance(data, DataError):
            raise data
        yield key, int(table.labels[row]), data


def iterate_images(
    folder: Storage, entry: ShardEntry, table: SampleTable, *, is_strict: bool
) -> Iterator[bytes | DataError]:
    """Yield the encoded image of every sample of a shard; a DataError for one with wrong bytes.

    Args:
        folder: of the dataset.
        entry: the shard.
        table: its table of samples.
        is_strict: whether a shard whose images are all right, but which is not the one of the index
            to the bit, is an error too. Otherwise it is warned of.

    Raises:
        DataError: the shard is missing, not a plain tar, or of another length; or see `is_strict`.
    """
    source = folder.uri(entry.file)
    _check_order(table, source)
    is_damaged = False
    try:
        size = folder.size(entry.file)
        if size != entry.bytes:
            raise DataError(f"{source}: {size} bytes, the index has {entry.bytes}; copy it again")
        with folder.open_read(entry.file) as file:
            _check_plain_tar(file, source)
            stream = HashedStream(file)
            for data in _read_images(stream, table, source):
                is_damaged |= isinstance(data, DataError)
                yield data
            found, _ = stream.finish()
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such file; the dataset is not complete") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error}") from error
    if found == entry.sha256 or is_damaged:  # whoever got an error knows already
        return
    problem = f"{source}: damaged: its sha256 is {found}, the index has {entry.sha256}"
    if is_strict:
        raise DataError(f"{problem}; copy it again")
    logger.warning("%s, but all its images are right", problem)


def _check_order(table: SampleTable, source: str) -> None:
    ends = table.offsets + table.sizes
    if (table.offsets[1:] < ends[:-1]).any():
        raise DataError(
            f"{source}: the table of samples is not in the order of the tar, or samples overlap; "
            "make the index again with `fqgan-data index`"
        )


def _read_images(
    stream: HashedStream, table: SampleTable, source: str
) -> Iterator[bytes | DataError]:
    for row, key in enumerate(table.keys):
        data = _read_at(stream, int(table.offsets[row]), int(table.sizes[row]), source)
        if image_digest(data) == table.digests[row].tobytes():
            yield data
        else:
            yield DataError(
                f"{source}: sample {key!r}: damaged: its bytes are not those of the table "
                "of samples; copy the shard again"
            )


def _check_plain_tar(file: BinaryIO, source: str) -> None:
    # For a clear message alone: a gzip may carry the mark at this offset too. What protects is that
    # bytes are taken by their offsets and hashed, and nothing is ever expanded.
    head = file.read(tarfile.BLOCKSIZE)
    if head[_MARK] != b"ustar" and not _is_header(head):
        raise DataError(
            f"{source}: not a plain tar archive (compressed ones cannot be read by offset); "
            "make it with `fqgan-data shard`"
        )
    file.seek(0, os.SEEK_SET)


def _is_header(block: bytes) -> bool:
    """Whether a block is a tar's header of any age, by its checksum."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _read_at(stream: HashedStream, offset: int, size: int, source: str) -> bytes:
    """Pass over what lies before `offset` and read `size` bytes there."""
    while (gap := offset - stream.num_bytes) > 0 and stream.read(min(_BLOCK_BYTES, gap)):
        pass
    data = stream.read(size)
    if stream.num_bytes != offset + size:
        raise DataError(
            f"{source}: ends at byte {stream.num_bytes}, before its last sample; copy it again"
        )
    return data
