"""What is in a tar that somebody else made: one pass, its samples and its hash."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fqgan_dist.credentials import holds_credentials
from fqgan_dist.data.config import USUAL_VIEW_SHORT_SIDE
from fqgan_dist.data.decoding import decode_image, read_size
from fqgan_dist.data.index import SampleTable, SourceProblem, image_digest, stack_digests
from fqgan_dist.data.views import find_fault_of_shape
from fqgan_dist.errors import DataError
from fqgan_dist.sharding.listing import HOLDS_CREDENTIALS, show_name
from fqgan_dist.sharding.sample_rules import SampleRules
from fqgan_dist.sharding.sample_scanning import OddMember, ReadSample, SampleScan
from fqgan_dist.sharding.tar_scanning import TarScan
from fqgan_dist.storage.documents import parse_json
from fqgan_dist.storage.storage import Storage

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("digest", pa.binary(16)),
    ]
)


@dataclass(frozen=True)
class FoundSample:
    """A usable sample of a tar."""

    key: str
    """Its key."""
    label: str
    """Text of its label; "" where there are no labels."""
    offset: int
    """Where the image's bytes begin."""
    size: int
    """Number of the image's bytes."""
    width: int
    """Pixels per row, upright."""
    height: int
    """Rows, upright."""
    digest: bytes
    """See `image_digest`."""


@dataclass(frozen=True)
class ShardScan:
    """What was found in a tar."""

    sha256: str
    """Hash of the file, hex."""
    num_bytes: int
    """Size of the file."""
    samples: list[FoundSample]
    """The usable samples, in the order of the tar."""
    problems: list[SourceProblem]
    """Members and samples that are not used."""

    @property
    def labels(self) -> list[str]:
        """The texts of labels that occur, sorted."""
        return sorted({sample.label for sample in self.samples})

    def tabulate(self, labels: list[int]) -> SampleTable:
        """Make the table of samples, with a number for each sample's label."""
        samples = self.samples
        return SampleTable(
            keys=[sample.key for sample in samples],
            labels=np.array(labels, np.int32),
            offsets=np.array([sample.offset for sample in samples], np.int64),
            sizes=np.array([sample.size for sample in samples], np.int64),
            widths=np.array([sample.width for sample in samples], np.int32),
            heights=np.array([sample.height for sample in samples], np.int32),
            digests=stack_digests([sample.digest for sample in samples]),
        )

    def to_bytes(self) -> bytes:
        """Write everything as parquet, for another process."""
        rows = [vars(sample) for sample in self.samples]
        facts = {
            "sha256": self.sha256,
            "num_bytes": self.num_bytes,
            "problems": [problem.model_dump() for problem in self.problems],
        }
        schema = _SCHEMA.with_metadata({"facts": json.dumps(facts)})
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
        return sink.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> ShardScan:
        """Read what `to_bytes` wrote."""
        with pq.ParquetFile(io.BytesIO(data)) as file:
            table = file.read(use_threads=False)
        facts: dict[str, Any] = parse_json((table.schema.metadata or {})[b"facts"])
        problems = [SourceProblem(**values) for values in facts["problems"]]
        samples = [FoundSample(**row) for row in table.to_pylist()]
        return ShardScan(facts["sha256"], facts["num_bytes"], samples, problems)


def scan_shard(
    storage: Storage,
    file: str,
    rules: SampleRules,
    *,
    is_deep: bool,
    view_short_side: int = USUAL_VIEW_SHORT_SIDE,
) -> ShardScan:
    """Read a tar once.

    Args:
        storage: where the shards are.
        file: name of the tar.
        rules: where images and labels are.
        is_deep: decode every image; else only the headers are read.
        view_short_side: short side of the views that images must be good for.

    Raises:
        DataError: the tar is missing, compressed, damaged or cut off, or holds a key twice.
    """
    source = storage.uri(file)
    problems: list[SourceProblem] = []
    samples: dict[str, FoundSample] = {}
    try:
        with storage.open_read(file) as stream:
            scan = TarScan(stream, source=source)
            for found in SampleScan(scan, rules, shard=file).read(with_images=True):
                if isinstance(found, OddMember):
                    problems.append(_describe_problem(file, found))
                    continue
                if found.key in samples:
                    raise DataError(f"{source}: {describe_repeat(found.key, file, file)}")
                try:
                    samples[found.key] = _examine(
                        found, is_deep=is_deep, view_short_side=view_short_side
                    )
                except DataError as error:
                    odd = OddMember(found.key, str(error), "skipped")
                    problems.append(_describe_problem(file, odd))
            sha256, num_bytes = scan.finish()
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such file; it was there a moment ago") from error
    return ShardScan(sha256, num_bytes, list(samples.values()), problems)


def describe_repeat(key: str, file: str, other: str) -> str:
    """Say that a key occurs twice, and what to do about it."""
    return (
        f"the key {key!r} occurs in {file} and again in {other}; expected that no two samples "
        "share a key: make a dataset of its own with `fqgan-data shard SRC DST "
        "format=webdataset keep_keys=false`, which gives every sample a new one"
    )


def _describe_problem(file: str, odd: OddMember) -> SourceProblem:
    name = show_name(f"{file}/{odd.name}")
    return SourceProblem(name=name, reason=odd.reason, action=odd.action)


def _examine(sample: ReadSample, *, is_deep: bool, view_short_side: int) -> FoundSample:
    """Check a sample; DataError says why it is not usable."""
    if holds_credentials(sample.key):
        raise DataError(f"its key: {HOLDS_CREDENTIALS}")
    image = sample.image
    assert image.data is not None, "an image's bytes were asked for"
    if is_deep:
        width, height = decode_image(image.data, name=image.name).size
    else:
        width, height = read_size(image.data, name=image.name)
    if fault := find_fault_of_shape(width, height, view_short_side):
        raise DataError(fault)
    digest = image_digest(image.data)
    return FoundSample(sample.key, sample.label, image.offset, image.size, width, height, digest)
