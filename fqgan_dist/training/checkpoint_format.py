"""What a checkpoint looks like on storage: names, manifest, and the rules that make it whole.

    commits/0000000007.json                       the log (commit_log.py)
    step-00001000/attempt-<uuid>/
        <part>.rank-00000.00000.safetensors       tensors that a rank owns, named by parameter
        rank-00000.json                           what that rank wrote: sizes, hashes, shapes
        manifest.json                             everything above, config, state, metrics

A part is logical (`weights`, `optimizer`, `ema`): ranks own disjoint tensors of it, or disjoint
fragments of a tensor, and a reader merges them, so the number of ranks that wrote never matters.

Since format 2 the manifest has a hash of every block of a file, and says where in it a tensor lies:
a reader fetches, and verifies, no more than the blocks that what it needs touches. Files of format
1 are read, and verified, as a whole.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, ValidationError, model_validator

from fqgan_dist.config import MAX_COUNT, Config
from fqgan_dist.errors import CheckpointError
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.training.commit_log import AttemptId, Sha256

MANIFEST_NAME = "manifest.json"
STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
ATTEMPT_FOLDER = re.compile(r"attempt-([0-9a-f]{32})")
# Of PyTorch.
_MAX_DIMENSIONS = 64

# One flat file name: no separator, so a hostile manifest cannot lead out of its folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
PartName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=100)]
Size = Annotated[int, Field(ge=0, le=MAX_COUNT)]

FORMAT = 2
MAX_BLOCK_BYTES = 16 * 2**20
_HASH_DIGITS = 64


@dataclass(frozen=True)
class Span:
    """Contiguous elements of a flattened tensor."""

    start: int
    count: int


Needs = Mapping[str, Span | None]
"""What a reader needs of a part, by tensor name; None: the whole tensor."""


class TensorRecord(Config):
    """A tensor, or a fragment of one, in a file."""

    dtype: str
    """Name as in safetensors, such as `BF16`."""
    shape: list[Size] = Field(max_length=_MAX_DIMENSIONS)
    """Shape of the whole tensor."""
    start: Size | None = None
    """First element of the fragment in the flattened tensor; None when the whole tensor is here."""
    count: Size
    """Elements that are here."""
    offset: Size | None = None
    """First byte of them in the file; None in format 1, whose readers take it from the file."""


class BlockHashes(Config):
    """Hashes of the blocks of a file, by which any part of it can be verified alone."""

    bytes: int = Field(gt=0, le=MAX_BLOCK_BYTES)
    """Size of a block; the last may be shorter."""
    sha256: str = Field(pattern=r"^([0-9a-f]{64})+$")
    """Of each block's bytes, one after the other: one text, of which there is one error at most."""

    @property
    def count(self) -> int:
        return len(self.sha256) // _HASH_DIGITS

    def of(self, number: int) -> str:
        """Give the sha256 of a block."""
        return self.sha256[number * _HASH_DIGITS : (number + 1) * _HASH_DIGITS]

    def root(self) -> str:
        """Hash the hashes: one value for the file, for which no byte is hashed once more."""
        return hashlib.sha256(bytes.fromhex(self.sha256)).hexdigest()


class FileRecord(Config):
    """A safetensors file of one rank and part."""

    file: FileName
    part: PartName
    bytes: int = Field(gt=0, le=MAX_COUNT)
    sha256: Sha256
    """Of the file's bytes; where there are `blocks`, of their hashes (`BlockHashes.root`)."""
    blocks: BlockHashes | None = None
    """None in format 1."""
    tensors: dict[str, TensorRecord]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if self.blocks is not None:
            expected = -(-self.bytes // self.blocks.bytes)
            if self.blocks.count != expected:
                raise ValueError(
                    f"{self.file}: has {self.blocks.count} hashes of blocks, expected "
                    f"{expected} for its {self.bytes} bytes"
                )
            if self.blocks.root() != self.sha256:
                raise ValueError(f"{self.file}: its sha256 is not that of its blocks' hashes")
            if any(record.offset is None for record in self.tensors.values()):
                raise ValueError(f"{self.file}: does not say where its tensors lie")
        return self


# A hostile list ends at its first error: else its message has a line for each of its items.
PartNames = Annotated[list[PartName], FailFast()]
FileRecords = Annotated[list[FileRecord], FailFast()]


class RankReport(Config):
    """What one rank wrote; the commit waits for all of them."""

    step: Size
    attempt: AttemptId
    rank: Size
    world_size: int = Field(gt=0, le=MAX_COUNT)
    parts: PartNames
    """All parts, also those of which this rank owns nothing."""
    files: FileRecords


class Manifest(Config):
    """The whole checkpoint."""

    format: Literal[1, 2] = FORMAT
    """Version of this layout; 1 has no hashes of blocks."""
    step: Size
    attempt: AttemptId
    world_size: int = Field(gt=0, le=MAX_COUNT)
    """Number of ranks that wrote it; any number may read it."""
    dataset_id: str
    """sha256 of the dataset's index.json."""
    config: dict[str, Any]
    """Architecture, compared at resume."""
    state: dict[str, Any]
    """Plain values to go on from: images_seen, seeds, schedules."""
    metrics: dict[str, float]
    """Evaluation at this step; may be empty."""
    parts: PartNames
    files: FileRecords
    """Files of all ranks, in rank order."""

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        odd = [file.file for file in self.files if (file.blocks is None) != (self.format == 1)]
        if odd:
            raise ValueError(f"format {self.format}: {odd[0]} is of another one")
        return self


def hash_blocks(data: bytes | memoryview, block_bytes: int) -> BlockHashes:
    """Hash the blocks of a file: each byte once."""
    view = memoryview(data)
    starts = range(0, len(view), block_bytes)
    hashes = [hashlib.sha256(view[start : start + block_bytes]).hexdigest() for start in starts]
    return BlockHashes(bytes=block_bytes, sha256="".join(hashes))


def checkpoint_folder(step: int, attempt: str) -> str:
    return f"step-{step:08d}/attempt-{attempt}"


def report_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def part_file_name(part: str, rank: int, index: int) -> str:
    return f"{part}.rank-{rank:05d}.{index:05d}.safetensors"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Decode and check a manifest.

    Raises:
        CheckpointError: it is no manifest of this format, or its parts are not whole.
    """
    try:
        manifest = Manifest.model_validate(parse_json(data))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(
            f"{where}: not a checkpoint manifest of format 1 or {FORMAT}: {error}"
        ) from error
    check_parts(manifest.files, where)
    return manifest


def merge_reports(reports: list[RankReport], where: str) -> tuple[list[str], list[FileRecord]]:
    """Combine the reports of all ranks into parts and files.

    Raises:
        CheckpointError: they are of different checkpoints, or the parts are not whole.
    """
    for rank, report in enumerate(reports):
        identity = (report.step, report.attempt, report.rank, report.world_size)
        expected = (reports[0].step, reports[0].attempt, rank, len(reports))
        if identity != expected:
            raise CheckpointError(
                f"{where}: the report of rank {rank} is of (step, attempt, rank, world size) "
                f"{identity}, expected {expected}; every rank must save the same steps"
            )
    files = [file for report in reports for file in report.files]
    check_parts(files, where)
    return sorted({part for report in reports for part in report.parts}), files


def check_parts(files: Iterable[FileRecord], where: str) -> None:
    """Check that every tensor is there exactly once, whole or in fragments that cover it.

    Raises:
        CheckpointError: a tensor is owned twice, or its fragments overlap, leave a gap or disagree.
    """
    owners: dict[tuple[str, str], list[TensorRecord]] = {}
    for file in files:
        for name, record in file.tensors.items():
            owners.setdefault((file.part, name), []).append(record)
    for (part, name), records in owners.items():
        problem = _find_problem(records)
        if problem:
            raise CheckpointError(f"{where}: part {part!r}, tensor {name!r}: {problem}")


def _find_problem(records: list[TensorRecord]) -> str | None:
    first = records[0]
    size = math.prod(first.shape)
    if any((other.dtype, other.shape) != (first.dtype, first.shape) for other in records):
        return "ranks disagree on its dtype or shape"
    if any(record.start is None for record in records):
        if len(records) > 1:
            return f"written by {len(records)} ranks; exactly one must own it"
        return None if first.count == size else f"has {first.count} of {size} elements"
    position = 0
    for record in sorted(records, key=lambda record: (record.start or 0, record.count)):
        if record.start != position:
            return f"its fragments leave a gap or overlap before element {record.start}"
        position += record.count
    return None if position == size else f"its fragments cover {position} of {size} elements"
