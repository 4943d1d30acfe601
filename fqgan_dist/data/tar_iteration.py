"""A whole shard from front to back, through webdataset's tar layer.

Shards are hostile input: the stream is opened by our storage (webdataset would run `pipe:` URLs
through a shell), only the members of a whitelist are read, nothing is decoded by webdataset (it
would unpickle `.pkl` members), compressed archives are refused, and the bytes are checked against
the index.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_iterator

from fqgan_dist.data.index import ShardEntry
from fqgan_dist.data.storage import Storage
from fqgan_dist.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_LABEL_SUFFIX = "cls"
_TAR_MAGIC_OFFSET = 257
_TAR_MAGIC = b"ustar"
_DRAIN_BYTES = 2**20


def iterate_shard(
    storage: Storage, prefix: str, entry: ShardEntry
) -> Iterator[tuple[str, int, bytes]]:
    """Yield key, label and encoded image of every sample of a shard, in row order.

    The hash is known only after the last sample: results are good once the iterator ends.

    Args:
        storage: where the dataset is.
        prefix: the dataset's folder; "" for the root.
        entry: the shard.

    Raises:
        DataError: the shard is missing, not a plain tar, damaged, or not the one of the index.
    """
    path = f"{prefix.rstrip('/')}/{entry.file}" if prefix.rstrip("/") else entry.file
    source = storage.uri(path)
    try:
        size = storage.size(path)
        if size != entry.bytes:
            raise DataError(f"{source}: {size} bytes, the index has {entry.bytes}; copy it again")
        with storage.open_read(path) as file:
            _check_plain_tar(file, source)
            stream = _HashedStream(file)
            yield from _read_samples(stream, source, entry.count)
            found = stream.finish()
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such file; the dataset is not complete") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{source}: cannot be read as a tar archive: {error}") from error
    if found != entry.sha256:
        raise DataError(
            f"{source}: damaged: its sha256 is {found}, the index has {entry.sha256}; copy it again"
        )


def _read_samples(
    stream: _HashedStream, source: str, count: int
) -> Iterator[tuple[str, int, bytes]]:
    members = tar_file_iterator(stream, select_files=_is_wanted)  # pyright: ignore[reportArgumentType]  # it takes any stream
    found = 0
    try:
        for sample in group_by_keys({**member, "__url__": source} for member in members):
            found += 1
            yield _parse_sample(sample, source)
    except ValueError as error:  # of webdataset: a member that occurs twice
        raise DataError(f"{source}: {error.args[0]}; make the dataset again") from error
    if found != count:
        raise DataError(f"{source}: {found} samples, the index has {count}; copy it again")


def _is_wanted(name: str) -> bool:
    suffix = name.rpartition(".")[2].lower()
    return suffix == _LABEL_SUFFIX or suffix in IMAGE_SUFFIXES


def _parse_sample(sample: dict[str, bytes], source: str) -> tuple[str, int, bytes]:
    key = str(sample["__key__"])
    images = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
    label = sample.get(_LABEL_SUFFIX, b"")
    if len(images) != 1 or not label.isdigit():
        raise DataError(
            f"{source}: sample {key!r}: {len(images)} images and label {label[:20]!r}; "
            "expected one image and a whole number"
        )
    return key, int(label), images[0]


def _check_plain_tar(file: BinaryIO, source: str) -> None:
    # A small compressed archive could fill the memory; webdataset would expand it unasked.
    head = file.read(_TAR_MAGIC_OFFSET + len(_TAR_MAGIC))
    if not head.endswith(_TAR_MAGIC):
        raise DataError(f"{source}: not a plain tar archive; make it with `fqgan-data shard`")
    file.seek(0, os.SEEK_SET)


class _HashedStream(io.RawIOBase):
    """Reads a file and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def finish(self) -> str:
        """Read what the tar reader left (padding) and give the hash of the whole."""
        while self.read(_DRAIN_BYTES):
            pass
        return self._hash.hexdigest()
