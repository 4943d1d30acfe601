"""Tensors from the files of a checkpoint: what a reader needs, each byte verified and read once.

Of a file with hashes of blocks the blocks that the needed elements touch are read, as few ranges;
of one without (format 1) all of it. What ranks wrote in fragments comes out merged.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.hashing import hash_object
from fqgan_dist.storage.links import RefusedObjectError
from fqgan_dist.storage.storage import Storage
from fqgan_dist.training.checkpoint_files import (
    DTYPES,
    Fragment,
    num_bytes_of,
    stored_shape,
)
from fqgan_dist.training.checkpoint_format import (
    BlockHashes,
    FileRecord,
    Needs,
    Span,
    TensorRecord,
)
from fqgan_dist.training.checkpoint_transfer import TRANSFER_THREADS
from fqgan_dist.weights.files import parse_safetensors

# What one thread has in hand at a time; larger ranges are read side by side. From a disk so little
# that its memory is used again, and still in the cache when it is copied: less CPU by a third. From
# a bucket so much that it comes over several connections.
_MAX_RANGE_BYTES = 64 * 2**20
_MAX_LOCAL_RANGE_BYTES = 8 * 2**20


class DamagedCheckpointError(CheckpointError):
    """Bytes of a checkpoint are missing, or are not those that were written."""


class ReadCounter:
    """Counts the bytes of tensor files that were read, over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes


@dataclass(frozen=True)
class CheckpointFolder:
    """Where the files of a checkpoint lie, and what was read of them."""

    storage: Storage
    path: str
    counter: ReadCounter

    def name(self, file: FileRecord) -> str:
        return f"{self.path}/{file.file}"

    def uri(self, file: FileRecord) -> str:
        return self.storage.uri(self.name(file))


@dataclass(frozen=True)
class _Target:
    """A tensor that is being put together: the elements of `span`, flat."""

    values: Tensor
    span: Span
    shape: tuple[int, ...]
    is_whole: bool

    @classmethod
    def of(cls, record: TensorRecord, span: Span | None) -> _Target:
        shape = tuple(record.shape)
        covered = span if span is not None else Span(0, torch.Size(shape).numel())
        values = torch.empty(covered.count, dtype=DTYPES[record.dtype])
        return cls(values, covered, shape, span is None)

    def finish(self) -> Tensor | Fragment:
        if self.is_whole:
            return self.values.view(self.shape)
        return Fragment(self.values, self.span.start, self.shape)


@dataclass(frozen=True)
class _Share:
    """What a file has of a target: `count` elements from the `start`-th of the whole tensor."""

    name: str
    record: TensorRecord
    target: _Target
    start: int
    count: int

    @property
    def num_bytes(self) -> int:
        return self.count * self.target.values.element_size()

    @property
    def position(self) -> int:
        """First byte of the share among the target's."""
        return (self.start - self.target.span.start) * self.target.values.element_size()

    @property
    def skipped(self) -> int:
        """Elements of the record before the share."""
        return self.start - (self.record.start or 0)

    @property
    def offset(self) -> int:
        """First byte of the share in the file."""
        assert self.record.offset is not None, "files with blocks say where their tensors lie"
        return self.record.offset + self.skipped * self.target.values.element_size()


Job = Callable[[], None]


def read_tensors(
    folder: CheckpointFolder, files: Sequence[FileRecord], needs: Needs | None
) -> dict[str, Tensor | Fragment]:
    """Read of one part what is needed, on the CPU, merging what ranks wrote.

    Returns all names of the part: whole tensors where the whole was needed, else fragments, empty
    ones of tensors that were not named; with `needs` None all tensors, whole.

    Raises:
        DamagedCheckpointError: a byte that is needed is missing, or not the one that was written.
        CheckpointError: the manifest contradicts itself or its files.
        ValueError: a span is not within its tensor.
    """
    found = {name: record for file in files for name, record in file.tensors.items()}
    spans = {name: _span_of(name, record, needs) for name, record in found.items()}
    wanted = [file for file in files if any(_overlaps(file, name, spans) for name in file.tensors)]
    for file in files:
        _check_record(folder.uri(file), file)
    with ThreadPoolExecutor(TRANSFER_THREADS, "checkpoint-read") as executor:
        # Before memory is taken for what a manifest says.
        list(executor.map(lambda file: _check_size(folder, file), wanted))
        targets = {name: _Target.of(record, spans[name]) for name, record in found.items()}
        jobs = [job for file in wanted for job in _plan(folder, file, targets)]
        list(executor.map(lambda job: job(), jobs))
    return {name: target.finish() for name, target in targets.items()}


def find_damage(folder: CheckpointFolder, files: Sequence[FileRecord]) -> list[str]:
    """Compare files with their recorded sizes and hashes; return one line per damaged file."""

    def find(file: FileRecord) -> str | None:
        try:
            _verify(folder, file)
        except DamagedCheckpointError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(TRANSFER_THREADS, "checkpoint-verify") as executor:
        return [problem for problem in executor.map(find, files) if problem]


def find_blocks(file: FileRecord, shares: Mapping[str, Span]) -> list[int]:
    """Give the numbers of the blocks of a file that elements of its tensors touch, in order.

    Args:
        file: with hashes of blocks.
        shares: by name, elements counted in the whole tensor; all of them are in the file.
    """
    assert file.blocks is not None, "format 1 has no blocks"
    numbers: set[int] = set()
    for name, span in shares.items():
        record = file.tensors[name]
        if span.count:
            width = DTYPES[record.dtype].itemsize
            first = (record.offset or 0) + (span.start - (record.start or 0)) * width
            last = first + span.count * width - 1
            numbers.update(range(first // file.blocks.bytes, last // file.blocks.bytes + 1))
    return sorted(numbers)


def _span_of(name: str, record: TensorRecord, needs: Needs | None) -> Span | None:
    if needs is None:
        return None
    span = needs.get(name, Span(0, 0))
    if span is not None and not 0 <= span.start <= span.start + span.count <= _size(record):
        raise ValueError(f"{span} of tensor {name!r}, which has {_size(record)} elements")
    return span


def _size(record: TensorRecord) -> int:
    return torch.Size(record.shape).numel()


def _intersect(record: TensorRecord, span: Span | None) -> Span:
    """Give the elements of a span that a record has; count 0 if none."""
    start = record.start or 0
    if span is None:
        return Span(start, record.count)
    first = max(start, span.start)
    end = min(start + record.count, span.start + span.count)
    return Span(first, max(0, end - first))


def _overlaps(file: FileRecord, name: str, spans: Mapping[str, Span | None]) -> bool:
    # Of an empty tensor nothing is needed but the file that says that it is there.
    record, span = file.tensors[name], spans[name]
    return _intersect(record, span).count > 0 or (span is None and record.count == 0)


def _check_record(uri: str, file: FileRecord) -> None:
    """Refuse a manifest that asks for memory that its files do not have."""
    for name, record in file.tensors.items():
        if record.dtype not in DTYPES:
            raise CheckpointError(
                f"{uri}: tensor {name!r} has dtype {record.dtype!r}; expected one of "
                f"{', '.join(DTYPES)}"
            )
        if (record.offset or 0) + num_bytes_of(record) > file.bytes:
            raise CheckpointError(f"{uri}: tensor {name!r} does not lie within its file")


def _check_size(folder: CheckpointFolder, file: FileRecord) -> None:
    try:
        size = folder.storage.size(folder.name(file))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder.uri(file)}: missing") from error
    except RefusedObjectError as error:
        raise DamagedCheckpointError(str(error)) from error
    if size != file.bytes:
        raise DamagedCheckpointError(
            f"{folder.uri(file)}: damaged, {size} bytes where the manifest says {file.bytes}"
        )


def _plan(
    folder: CheckpointFolder, file: FileRecord, targets: Mapping[str, _Target]
) -> Iterator[Job]:
    """Divide the reading of a file into jobs of bounded size."""
    shares: list[_Share] = []
    for name, record in file.tensors.items():
        target = targets[name]
        span = _intersect(record, None if target.is_whole else target.span)
        if span.count:
            shares.append(_Share(name, record, target, span.start, span.count))
    if file.blocks is None:
        yield lambda: _read_whole(folder, file, shares)
        return
    numbers = find_blocks(file, {share.name: Span(share.start, share.count) for share in shares})
    longest = _MAX_LOCAL_RANGE_BYTES if folder.storage.is_local else _MAX_RANGE_BYTES
    for first, last in _runs(numbers, max(1, longest // file.blocks.bytes)):
        yield _range_job(folder, file, shares, (first, last))


def _runs(numbers: Sequence[int], longest: int) -> Iterator[tuple[int, int]]:
    """Join consecutive numbers: (first, last) of each run, of at most `longest`."""
    if not numbers:
        return
    first = numbers[0]
    for number, following in pairwise(numbers):
        if following != number + 1 or following - first == longest:
            yield first, number
            first = following
    yield first, numbers[-1]


def _range_job(
    folder: CheckpointFolder, file: FileRecord, shares: Sequence[_Share], run: tuple[int, int]
) -> Job:
    def read() -> None:
        blocks = file.blocks
        assert blocks is not None, "a plan of ranges is of a file with blocks"
        start = run[0] * blocks.bytes
        end = min(file.bytes, (run[1] + 1) * blocks.bytes)
        try:
            data = folder.storage.read_bytes(folder.name(file), offset=start, length=end - start)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{folder.uri(file)}: missing") from error
        folder.counter.add(len(data))
        _check_blocks(folder.uri(file), blocks, run[0], memoryview(data))
        for share in shares:
            first, last = max(share.offset, start), min(share.offset + share.num_bytes, end)
            if first < last:
                piece = memoryview(data)[first - start : last - start]
                _copy(piece, share.target, share.position + first - share.offset)

    return read


def _check_blocks(uri: str, blocks: BlockHashes, first: int, data: memoryview) -> None:
    """Compare the bytes of whole blocks, from the `first` on, with their hashes."""
    for start in range(0, len(data), blocks.bytes):
        block = data[start : start + blocks.bytes]
        number = first + start // blocks.bytes
        if hashlib.sha256(block).hexdigest() != blocks.of(number):
            begin = number * blocks.bytes
            raise DamagedCheckpointError(
                f"{uri}: damaged, bytes {begin} to {begin + len(block) - 1}: their sha256 is not "
                "the manifest's"
            )


def _copy(data: memoryview, target: _Target, position: int) -> None:
    # By numpy, which lets other threads run meanwhile: most of the time goes to new pages.
    view = target.values.view(torch.uint8).numpy()
    view[position : position + len(data)] = np.frombuffer(data, np.uint8)


def _read_whole(folder: CheckpointFolder, file: FileRecord, shares: Sequence[_Share]) -> None:
    """Read a file of format 1, which is verified, and says where its tensors lie, as a whole."""
    uri = folder.uri(file)
    try:
        data = folder.storage.read_limited(folder.name(file), file.bytes)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{uri}: missing") from error
    except RefusedObjectError as error:
        raise DamagedCheckpointError(str(error)) from error
    folder.counter.add(len(data))
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedCheckpointError(f"{uri}: damaged, its sha256 is not the manifest's")
    try:
        tensors = parse_safetensors(data)
    except ValueError as error:
        raise CheckpointError(f"{uri}: not a safetensors file: {error}") from error
    expected = {name: (DTYPES[r.dtype], stored_shape(r)) for name, r in file.tensors.items()}
    if {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} != expected:
        raise CheckpointError(f"{uri}: holds other tensors than its manifest says")
    for share in shares:
        begin = share.start - share.target.span.start
        piece = tensors[share.name].reshape(-1).narrow(0, share.skipped, share.count)
        share.target.values.narrow(0, begin, share.count).copy_(piece)


def _verify(folder: CheckpointFolder, file: FileRecord) -> None:
    """Read a whole file, in pieces, and compare."""
    _check_size(folder, file)
    path, uri = folder.name(file), folder.uri(file)
    try:
        if file.blocks is None:
            if hash_object(folder.storage, path, max_bytes=file.bytes) != (file.sha256, file.bytes):
                raise DamagedCheckpointError(f"{uri}: damaged, its sha256 is not the manifest's")
            return
        with folder.storage.open_read(path) as stream:
            for number in range(file.blocks.count):
                data = stream.read(file.blocks.bytes)
                _check_blocks(uri, file.blocks, number, memoryview(data))
                if not data:
                    raise DamagedCheckpointError(f"{uri}: damaged, shorter than it was")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{uri}: missing") from error
    except RefusedObjectError as error:
        raise DamagedCheckpointError(str(error)) from error
